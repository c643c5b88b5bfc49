"""Labels that look like misspellings of others."""

from collections.abc import Mapping

LONGEST = 40  # letters of a label that is compared; longer ones are sentences
RATIO = 5  # how much more frequent the right spelling must be


def likely_typos(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """(rare, frequent) pairs of labels that differ by case, white space, a plural or one letter.

    Args:
        counts: label -> how often.

    One letter counts in words of five and more ("bicylce": two swapped are one), and only where the other spelling is
    at least `RATIO` times as frequent: "cat" and "car" are both right.
    """
    labels = sorted(counts, key=lambda label: -counts[label])
    found: list[tuple[str, str]] = []
    by_plain: dict[str, str] = {}
    for label in labels:
        plain = _plain(label)
        if plain in by_plain and by_plain[plain] != label:
            found.append((label, by_plain[plain]))
        by_plain.setdefault(plain, label)
    told = {rare for rare, _ in found}
    # Texts that differ by one edit share what is left of them when a letter is taken out.
    by_shortened: dict[str, list[str]] = {}
    for rare in labels:  # the frequent ones come first
        lower = rare.lower()
        variants = {lower, *(lower[:i] + lower[i + 1 :] for i in range(len(lower)))} if len(lower) <= LONGEST else set()
        near = {label for variant in variants for label in by_shortened.get(variant, ())}
        for frequent in sorted(near, key=lambda label: -counts[label]):
            is_rare = counts[frequent] >= RATIO * counts[rare] and max(len(rare), len(frequent)) >= 5
            if rare not in told and is_rare and one_edit(lower, frequent.lower()):
                found.append((rare, frequent))
                told.add(rare)
                break
        for variant in variants:
            by_shortened.setdefault(variant, []).append(rare)
    return found


def one_edit(a: str, b: str) -> bool:
    """Whether two texts differ by one letter put in, left out or changed, or by two neighbours swapped."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    if len(a) > len(b):
        a, b = b, a
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    if a[start + 1 :] == b[start + 1 :]:
        return True
    swapped = a[:start] + a[start + 1 : start + 2] + a[start] + a[start + 2 :]
    return swapped == b


def _plain(label: str) -> str:
    """Without case, hyphens and outer or doubled white space, and without the s of a plural."""
    words = label.lower().replace("-", " ").replace("_", " ").split()
    joined = " ".join(words)
    return joined[:-1] if len(joined) > 3 and joined.endswith("s") and not joined.endswith("ss") else joined
