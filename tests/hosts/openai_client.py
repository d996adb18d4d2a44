"""The real `openai` client against `rewardrt serve`.

    python tests/hosts/openai_client.py URL EXPECTED.json

EXPECTED.json holds what the Rust API answers: {"greedy": {"text", "ids"}, "sampled": [text, …]} for the requests below.
Prints one line a check; exits 0 if all hold.
"""

import asyncio
import json
import math
import sys

import openai
from openai import AsyncOpenAI, OpenAI

MESSAGES = [{"role": "user", "content": "Name three colours."}]


def check(what, holds, detail=""):
    if not holds:
        sys.exit(f"FAILED: {what}: {detail}")
    print(f"ok: {what}")


def chat(client, expected):
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_completion_tokens=24,
        extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    check("a greedy answer has the Rust API's text", choice.message.content == expected["greedy"]["text"], choice.message)
    check("and ids", choice.token_ids == expected["greedy"]["ids"], choice.token_ids)
    check("role, reason, usage", choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
          and answer.usage.total_tokens == answer.usage.prompt_tokens + len(choice.token_ids), answer)
    check("the version of the weights", answer.weight_version == 0, answer)


def samples(client, expected):
    def ask():
        return client.chat.completions.create(
            model="smollm2", messages=MESSAGES, temperature=0.9, top_p=0.9, seed=11, n=3, max_tokens=12)
    first, second = ask(), ask()
    texts = [c.message.content for c in first.choices]
    check("n answers, in order", [c.index for c in first.choices] == [0, 1, 2], first)
    check("a seed has the Rust API's answers", texts == expected["sampled"], texts)
    check("twice", texts == [c.message.content for c in second.choices], second)
    check("answers differ", len(set(texts)) > 1, texts)


def stream(client):
    arguments = dict(model="smollm2", messages=MESSAGES, seed=5, max_tokens=16)
    whole = client.chat.completions.create(**arguments)
    text, reasons, usage = "", [], None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    check("a stream adds up", text == whole.choices[0].message.content, text)
    check("with one reason and the usage", reasons == [whole.choices[0].finish_reason] and usage == whole.usage, usage)


def logprobs(client):
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=5)
    content = answer.choices[0].logprobs.content
    check("a token's log-prob is the best one's where it is greedy",
          all(math.isclose(t.logprob, t.top_logprobs[0].logprob) for t in content), content)
    check("alternatives fall and are a part of 1",
          all(len(t.top_logprobs) == 5 and sum(math.exp(a.logprob) for a in t.top_logprobs) <= 1.0001
              and t.top_logprobs == sorted(t.top_logprobs, key=lambda a: -a.logprob) for t in content), content)
    spelled = b"".join(bytes(t.bytes) for t in content).decode()
    check("tokens spell the text", spelled.replace("<|im_end|>", "") == answer.choices[0].message.content, spelled)


def stop(client):
    free = client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=0, max_tokens=24)
    text = free.choices[0].message.content
    word = text.split()[3]
    cut = client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=0, max_tokens=24, stop=[word])
    check("a stop string cuts", cut.choices[0].message.content == text[:text.index(word)]
          and cut.choices[0].finish_reason == "stop", cut)


def text_completion(client):
    answer = client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2)
    choice = answer.choices[0]
    check("a text completion", "".join(choice.logprobs.tokens) == choice.text and len(choice.logprobs.token_logprobs) == 4
          and choice.logprobs.text_offset[0] == 0, choice)


def schema(client):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
              "additionalProperties": False}
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=60, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": schema}})
    check("a JSON schema is kept", json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue"), answer)


def errors(client, url):
    def raises(kind, ask):
        try:
            ask()
        except kind as error:
            return error
        sys.exit(f"FAILED: no {kind.__name__}")
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(model="smollm2", messages=MESSAGES, top_p=2))
    check("400 names the field", error.param == "top_p" and error.type == "invalid_request_error" and "from 0 to 1" in error.message, error)
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(
        model="smollm2", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]))
    check("400 names what is not supported", error.param == "tools", error)
    error = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4", messages=MESSAGES))
    check("404 for a model", error.code == "model_not_found", error)
    other = OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    error = raises(openai.AuthenticationError, lambda: other.models.list())
    check("401 for a token", error.code == "invalid_api_key", error)


async def many(url):
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="test-token", max_retries=0)
    def ask(seed):
        return client.chat.completions.create(model="smollm2", messages=MESSAGES, seed=seed, max_tokens=6)
    alone = await ask(3)
    crowd = await asyncio.gather(*(ask(seed) for seed in range(16)))
    check("a seed answers alike in a crowd", crowd[3].choices[0].message == alone.choices[0].message, crowd[3])


def main():
    url, expected = sys.argv[1], json.load(open(sys.argv[2]))
    client = OpenAI(base_url=f"{url}/v1", api_key="test-token", max_retries=0)
    check("models are listed", [m.id for m in client.models.list()] == ["smollm2"])
    chat(client, expected)
    samples(client, expected)
    stream(client)
    logprobs(client)
    stop(client)
    text_completion(client)
    schema(client)
    errors(client, url)
    asyncio.run(many(url))


main()
