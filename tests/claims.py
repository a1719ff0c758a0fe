"""What tests of the programs share: claims, counted, and told when they do not hold."""
import sys

counts = [0, 0]  # of claims that do not hold, and that do


def claim(name, ok, detail=""):
    counts[bool(ok)] += 1
    if not ok:
        print(f"FAILED: {name}\n  {str(detail)[:600]}")


def end(title):
    """The summary; the exit status is 1 if a claim does not hold."""
    print(f"{title}: {counts[True]} claims hold, {counts[False]} do not")
    sys.exit(1 if counts[False] else 0)


def content(path):
    with open(path, "rb") as f:
        return f.read()
