"""Depth plan `spread`: every word as often as the pattern says, mixed as evenly as can be.

A hybrid wants its few attention layers spread out and none of them first (Waleffe et al. 2024,
arXiv 2406.07887, section 3.2). Word `w` that stands `n` times in a stack of `N` takes the places
nearest to `(i + 1/2) N / n`; the commonest word fills the rest, the first place included.
"""

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.depth import depth_plan
from interlace.trainer.models.depth.repeat import read_words


@depth_plan("spread")
def spread(config: ModelSection) -> tuple[str, ...]:
    """Return the words of the pattern, mixed, `layers` times as many as stand there."""
    counts: dict[str, int] = {}
    for letters, times in read_words(config.pattern):
        counts[letters] = counts.get(letters, 0) + times * config.layers
    total = sum(counts.values())
    commonest = max(counts, key=lambda letters: counts[letters])
    stack = [""] * total
    for letters, count in sorted(counts.items(), key=lambda item: item[1]):
        if letters == commonest:
            continue
        for number in range(count):
            wanted = int((number + 0.5) * total / count)
            free = [place for place in range(total) if not stack[place] and (place or total == 1)]
            stack[min(free, key=lambda place: (abs(place - wanted), place))] = letters
    return tuple(letters or commonest for letters in stack)
