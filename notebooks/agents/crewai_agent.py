"""A CrewAI agent: a crew of one with two tools; sub-agents are tools of their lead."""

import logging

import task  # first: it switches reporting off
from crewai import LLM, Agent, Crew, Task
from crewai.events import LLMStreamChunkEvent, crewai_event_bus
from crewai.tools import tool

chunks = 0
logging.getLogger("crewai.llms").setLevel(logging.ERROR)  # it warns of every call's approximate token count


@crewai_event_bus.on(LLMStreamChunkEvent)
def count(source, event):
    global chunks
    chunks += bool(event.chunk)


def agent(asked, role, tools, session, parent=""):
    """One agent with a model client of its own."""
    llm = LLM(
        model=asked.model, provider="openai", base_url=asked.base_url, api_key=asked.key, stream=True,
        max_tokens=asked.max_tokens, default_headers=task.headers(session, parent),
        additional_params={"parallel_tool_calls": True},
    )  # fmt: skip
    goal = "answer the customer"
    return Agent(role=role.split(".")[0], goal=goal, backstory=role, llm=llm, tools=tools, max_iter=6, verbose=False)


def ask(one, question, before=()):
    """The answer to a question; earlier tasks are its context."""
    job = Task(description=question, expected_output="one sentence", agent=one, context=list(before))
    crew = Crew(agents=[one], tasks=[job], verbose=False, tracing=False)
    return str(crew.kickoff().raw), job


def specialist(asked, name):
    """A sub-agent as a tool of its lead."""

    @tool(f"ask_{name}")
    def consult(task_text: str) -> str:
        """Ask a specialist."""
        session = f"{asked.session}-{name}"
        one = agent(asked, f"You know {name}. {task.ROLE}", own_tools(), session, parent=asked.session)
        return ask(one, task_text)[0]

    consult.description = f"Ask the specialist for {name}."
    return consult


def own_tools():
    return [tool(task.find_order), tool(task.delivery_days)]


def main():
    asked = task.arguments()
    tools = [specialist(asked, name) for name in task.SPECIALISTS] if asked.orchestrate else own_tools()
    one = agent(asked, task.LEAD if asked.orchestrate else task.ROLE, tools, asked.session)
    answer, done = ask(one, task.QUESTION)
    follow_up, _ = ask(one, task.FOLLOW_UP, [done])
    task.tell("crewai", asked, [answer, follow_up], chunks)


main()
