"""What a long benchmark has measured: a JSON file that several processes may add to, shown as a Markdown table."""

from filelock import FileLock

from gae.files import read_json, write_json


def measured(out):
    """What a file of results holds, {name: {key: ...}}; nothing if there is none."""
    return read_json(out) if out.exists() else {}


def record(out, name, key, figures):
    """Add figures to a file of results that others may write to; all that it then holds."""
    with FileLock(f"{out}.lock"):
        results = measured(out)
        results.setdefault(name, {})[key] = figures
        write_json(out, results)
    return results


def markdown(titles, rows):
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
