"""Messages of errors as one sentence."""


def first_line(error: BaseException) -> str:
    """First line of an error's message that is not blank, and what follows a colon at its end; the name of its type if there
    is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = lines[:1]
    while found and found[-1].endswith(":") and len(found) < len(lines):
        found.append(lines[len(found)])
    return " ".join(found) or type(error).__name__
