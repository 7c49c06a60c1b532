"""Call a function URL that IAM guards (AuthType=AWS_IAM), with the stock OpenAI client.

    python -m examples.iam_client https://<id>.lambda-url.<region>.on.aws/v1

Run it from the repository's root. Credentials come from the environment, as for the AWS CLI.
"""

import sys

from infra.openai_iam import client


def main() -> None:
    openai = client(sys.argv[1])
    completion = openai.chat.completions.create(
        model=openai.models.list().data[0].id,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=32,
    )
    print(completion.choices[0].message.content)


if __name__ == "__main__":
    main()
