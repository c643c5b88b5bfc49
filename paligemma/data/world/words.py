"""Words that stand in the pictures."""

import string

import numpy as np

_LISTED = """
    an art ant bag ball band bank bat bed bee bell big bird blue boat body book box boy bread bus cake cap car
    card cat chair city clock cloud club coat coin cold cook cow cup dance dark day desk dog door dot dream drum
    duck ear earth east egg exit eye face farm fast film fire fish five flag food fork four fox frog fun game gate
    gift girl go gold good grass green hand hat hello help hill home hot house ice ink jam jazz jet job joy juice
    jump key king kite lake lamp leaf lemon lion love lunch map mark milk moon music nest new night no nose nut
    ocean off oil old on one open owl page paint park pen phone piano pig pizza play queen quiz rain red rice ring
    road rock rose run sale salt sea seven shop silk six sky snow sock soup star stop sun table taxi tea ten time
    toy train tree two up van voice walk wall water west wind wolf wood yes yoga zebra zero zoo
"""
WORDS: tuple[str, ...] = tuple(_LISTED.split())


def any_text(rng: np.random.Generator) -> str:
    """A number of 1-3 digits, a word, or letters at random (they cannot be guessed, only read)."""
    kind = rng.random()
    if kind < 0.3:
        return str(int(rng.integers(0, 10 ** int(rng.integers(1, 4)))))
    if kind < 0.8:
        text = WORDS[int(rng.integers(len(WORDS)))]
    else:
        letters = rng.integers(0, 26, size=int(rng.integers(2, 6)))
        text = "".join(string.ascii_lowercase[i] for i in letters)
    return text.upper() if rng.random() < 0.3 else text
