"""Rows of one model in a merged vocabulary: token by token, in float64."""


def vocabulary_rows(model, ids, size, vocabularies, matrices, base, rules=None):
    """Return ``size`` lists of floats; None for rows without a token.

    ``vocabularies`` are dicts from token to id, ``matrices`` lists of rows, ``rules`` maps tokens
    to (row, force).
    """
    rules = rules or {}

    def row_of(m, token):
        at = vocabularies[m].get(token)
        return None if at is None or at >= len(matrices[m]) else list(map(float, matrices[m][at]))

    width = len(matrices[0][0])
    out = [None] * size
    for token, at in ids.items():
        own = row_of(model, token)
        ruled, force = rules.get(token, (None, False))
        if own is not None and not force:
            out[at] = own
            continue
        if ruled is not None:
            out[at] = list(map(float, ruled))
            continue
        if base is not None and row_of(base, token) is not None:
            out[at] = row_of(base, token)
            continue
        having = [r for r in (row_of(m, token) for m in range(len(matrices))) if r is not None]
        if having:
            out[at] = [sum(column) / len(having) for column in zip(*having, strict=True)]
        else:
            out[at] = [0.0] * width
    return out
