"""An AutoGen agent: AssistantAgent with tools, its answer streamed; sub-agents are tools of their lead."""

import asyncio

import task  # first: it switches reporting off
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.tools import AgentTool
from autogen_core.models import ModelFamily, ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

chunks = 0


def agent(asked, name, role, tools, session, parent=""):
    """One agent with a model client of its own."""
    info = ModelInfo(vision=False, function_calling=True, json_output=False, structured_output=False,
                     family=ModelFamily.UNKNOWN)  # fmt: skip
    client = OpenAIChatCompletionClient(
        model=asked.model, base_url=asked.base_url, api_key=asked.key, model_info=info, max_tokens=asked.max_tokens,
        parallel_tool_calls=True, default_headers=task.headers(session, parent),
    )  # fmt: skip
    return AssistantAgent(
        name, client, tools=tools, system_message=role, description=role,
        model_client_stream=True, reflect_on_tool_use=True,
    )  # fmt: skip


async def ask(one, question):
    """The streamed answer to a question; the agent keeps the conversation."""
    global chunks
    answer = ""
    async for part in one.run_stream(task=question):
        if isinstance(part, ModelClientStreamingChunkEvent):
            chunks += 1
        elif isinstance(part, TaskResult):
            answer = part.messages[-1].to_text()
    return answer


def specialist(asked, name):
    """A sub-agent as a tool of its lead."""
    session = f"{asked.session}-{name}"
    role = f"You know {name}. {task.ROLE}"
    return AgentTool(
        agent(asked, name, role, [task.find_order, task.delivery_days], session, parent=asked.session),
        return_value_as_last_message=True,
    )


async def main():
    asked = task.arguments()
    tools = [task.find_order, task.delivery_days]
    if asked.orchestrate:
        tools = [specialist(asked, name) for name in task.SPECIALISTS]
    role = task.LEAD if asked.orchestrate else task.ROLE
    one = agent(asked, "lead" if asked.orchestrate else "clerk", role, tools, asked.session)
    answers = [await ask(one, question) for question in (task.QUESTION, task.FOLLOW_UP)]
    task.tell("autogen-agentchat", asked, answers, chunks)


asyncio.run(main())
