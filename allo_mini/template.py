"""Chat templates come with a checkpoint and are programs: they run in jinja2's immutable sandbox, in a process of its
own that is stopped when it takes too long, too much memory or writes too much. A template can change nothing and reach
nothing; without the process it could still loop for years or fill the memory. What a template is given is a list of
messages, which `messages` makes of prompts in other forms.
"""

import functools
import json
import re
import subprocess
import sys
import threading
from datetime import date

from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, BYTES = 10, 1 << 30, 1 << 24  # for one rendering
TODAY = date(2024, 7, 26)  # for all templates, Llama 3's own choice: what a run learns must not depend on its day
WORKERS = []  # the process, once it was needed
HH_TURN, HH_ROLES = "\n\nAssistant:", {"Human": "user", "Assistant": "assistant"}  # in Anthropic HH's dialogues


def is_dialogue(prompt: str | list[dict]) -> bool:
    """Whether a prompt is a dialogue as Anthropic HH has it, in one string."""
    return isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and HH_TURN in prompt


def messages(prompt: str | list[dict]) -> list[dict]:
    """A string as what a user says, one with Anthropic's dialogue as its turns; a message list as it is."""
    if not is_dialogue(prompt):
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + prompt.strip())[1:]
    turns = [{"role": HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    return turns if turns[-1]["content"] else turns[:-1]  # the last one asks for an answer


def render(template: str, **values) -> str:
    """What a template makes of JSON values. Raises ValueError, in one line, when it fails or is stopped."""
    return rendered(json.dumps([template, values]))


@functools.lru_cache(16)  # a pair's prompt is asked for with each response
def rendered(line: str) -> str:
    """`render` of a line of JSON, as the process reads it."""
    if not WORKERS or WORKERS[0].poll() is not None:
        WORKERS[:] = [subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, start_new_session=True)]  # Ctrl-C is not for it
    worker = WORKERS[0]
    timer = threading.Timer(SECONDS, worker.kill)
    timer.start()
    try:
        print(line, file=worker.stdin, flush=True)
        text, error = json.loads(worker.stdout.readline())
    except (OSError, ValueError):  # the process is gone, or its answer is cut off
        worker.kill()
        worker.wait()
        text, error = None, f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB"
    finally:
        timer.cancel()
    if error:
        raise ValueError(" ".join(error.split()))
    return text


# ---- what runs in the process ------------------------------------------------------------------------------

def refuse(message: str):
    """Templates call this to refuse a conversation."""
    raise ValueError(message)


@functools.cache
def compiled(template: str):
    """A template in the sandbox: it can neither import nor change anything."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(x, ensure_ascii=ensure_ascii, **kw)
    environment.globals.update(raise_exception=refuse, strftime_now=TODAY.strftime)
    # {% generation %} marks what an assistant says, for libraries that ask for it; here it is a condition that holds
    return environment.from_string(re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})",
                                          lambda tag: tag[1] + ("endif" if tag[2] else "if true"), template))


def answer(template: str, values: dict) -> list[str | None]:
    """[what the template writes, None] or [None, why it fails]; as a checkpoint's data it can fail in any way."""
    try:
        text = compiled(template).render(values)
        return [text, None] if len(text.encode()) <= BYTES else [None, f"it writes more than {BYTES} bytes"]
    except Exception as e:
        return [None, str(e) or type(e).__name__]


if __name__ == "__main__":  # a line of arguments in, a line with the answer out, until the parent is gone
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except ImportError:  # Windows: bounded in time only
        pass
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
