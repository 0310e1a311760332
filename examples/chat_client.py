# .venv/bin/python examples/chat_client.py "What is the capital of France?"  (beside serve.sh)
import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="One streamed chat completion.")
    parser.add_argument("message")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="a LoRA adapter of the server; default: its model")
    parser.add_argument("--max-tokens", type=int, default=80)
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none")
    stream = client.chat.completions.create(
        model=args.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.message}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
