"""Log lines of the keeper: one JSON object a line on stderr, with the names that the agent's logs have."""
import os
import time
from _json import encode_basestring_ascii as quoted   # `json` itself would import `re`: 4 ms of every start


def log(str level, str message, **fields) -> None:
    """`fields` are str, int or float. A stderr that cannot be written to is no reason to end."""
    cdef double now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    parts = [f'"time": "{moment}.{<long long>(now * 1000) % 1000:03d}Z"', f'"level": "{level}"', '"logger": "narrows.keeper"',
             f'"message": {quoted(message)}']
    for name, value in fields.items():
        shown = str(value) if isinstance(value, (int, float)) else quoted(str(value))
        parts.append(f"{quoted(name)}: {shown}")
    try:
        os.write(2, ("{" + ", ".join(parts) + "}\n").encode())
    except OSError:
        pass
