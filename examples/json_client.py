# .venv/bin/python examples/json_client.py "Clara is 31 and lives in Rome."  (beside serve.sh)
import argparse
import json

from openai import OpenAI

# vLLM lets the model write nothing else. `serve.sh` keeps digits and capitalized words of a text;
# for facts far back in long texts serve with `preset: "facts"`.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Facts of a text as JSON of a given schema.")
    parser.add_argument("text")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{args.text}\n\nWho is it, as JSON?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA},
        },
        max_tokens=100,
        temperature=0,
    )
    print(json.dumps(json.loads(answer.choices[0].message.content or ""), indent=2))


if __name__ == "__main__":
    main()
