"""The rows of a recovery that are about its steps, without what it was judged by."""


def steps_of(rows):
    return [row for row in rows if row["kind"] not in ("rate", "held_out", "kept")]
