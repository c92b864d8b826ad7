"""A LangGraph agent: a graph of two nodes, the model and its tools, that goes round until no tool is asked for."""

import asyncio

import task  # first: it switches reporting off
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

chunks = 0


def agent(asked, role, tools, session, parent=""):
    """The compiled graph of one agent."""
    model = ChatOpenAI(
        model=asked.model, base_url=asked.base_url, api_key=asked.key, max_tokens=asked.max_tokens,
        streaming=True, stream_usage=True, default_headers=task.headers(session, parent),
    ).bind_tools(tools, parallel_tool_calls=True)  # fmt: skip

    async def call_model(state: MessagesState):
        return {"messages": [await model.ainvoke([SystemMessage(role), *state["messages"]])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", call_model)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


async def ask(graph, messages, question):
    """The conversation with the question and its streamed answer added."""
    global chunks
    messages = [*messages, HumanMessage(question)]
    async for mode, part in graph.astream({"messages": messages}, stream_mode=["messages", "values"]):
        if mode == "values":
            messages = part["messages"]
        elif isinstance(part[0], AIMessageChunk) and part[0].content:
            chunks += 1
    return messages


def specialist(asked, name):
    """A sub-agent as a tool of its lead."""

    async def consult(task_text: str) -> str:
        session = f"{asked.session}-{name}"
        graph = agent(asked, f"You know {name}. {task.ROLE}", own_tools(), session, parent=asked.session)
        return (await ask(graph, [], task_text))[-1].content

    return tool(f"ask_{name}", description=f"Ask the specialist for {name}.")(consult)


def own_tools():
    return [tool(task.find_order), tool(task.delivery_days)]


async def main():
    asked = task.arguments()
    tools = [specialist(asked, name) for name in task.SPECIALISTS] if asked.orchestrate else own_tools()
    graph = agent(asked, task.LEAD if asked.orchestrate else task.ROLE, tools, asked.session)
    messages, answers = [], []
    for question in (task.QUESTION, task.FOLLOW_UP):
        messages = await ask(graph, messages, question)
        answers.append(messages[-1].content)
    task.tell("langgraph", asked, answers, chunks)


asyncio.run(main())
