"""Counts of a batch the obvious way: every sample spelled out token by token, at every scale."""

from collections import Counter

from lit_mm.model.batch import IGNORE_INDEX, IMAGE
from tests.helpers.batches import SCALES


def spelled(ids, labels, kept, visuals, scale, times):
    """One sample at a scale: (pixels that a visual token stands for or None, whether it has a label)."""
    time, scale = divmod(scale, len(SCALES))
    frames = [(n, len(own), own) for own in visuals for n in range(len(own))]
    found, last = [], None
    for position, (token, label, stays) in enumerate(zip(ids, labels, kept, strict=True)):
        if token != IMAGE:
            if stays >= time:
                found.append((None, position > 0 and label != IGNORE_INDEX))
            continue
        number, count, own = frames.pop(0)
        sets = min(count, times[time]) if times else count
        starts = [k * count // sets for k in range(sets)]
        if number in starts:
            begin = starts.index(number)
            end = [*starts, count][begin + 1]
            last = sum(own[number:end])
            found += [(last, False)] * SCALES[scale]
    return found


def slow_counts(samples, drawn, times, packing):
    """As `Counts`, from (ids, labels, kept, visuals as lists of pixels per frame)."""
    found, shown = Counter(), [0] * len(SCALES)
    longest = []
    for ids, labels, kept, visuals in samples:
        prefix = ids.index(IMAGE) if IMAGE in ids else len(ids)
        several = any(len(own) > 1 for own in visuals)
        done, lengths = set(), []
        for scale in drawn:
            whole = spelled(ids, labels, kept, visuals, scale, times)
            kind = scale if several else scale % len(SCALES) if visuals else None
            lengths.append(len(whole))
            if packing != "padded" and kind in done:
                continue
            shared = prefix if packing == "packed" and done else 0
            own = whole[shared:]
            if packing == "padded":
                found["pairs"] += len(own) * (len(own) + 1) // 2
            else:
                branch = len(whole) - prefix
                found["pairs"] += branch * prefix + branch * (branch + 1) // 2
                found["pairs"] += prefix * (prefix + 1) // 2 if not shared else 0
            visual = [pixels for pixels, _ in own if pixels]
            found["visual"] += len(visual)
            found["text"] += len(own) - len(visual)
            seen = own if packing == "padded" or not done else whole[prefix:]
            found["labels"] += sum(asked for _, asked in seen)
            tokens = SCALES[scale % len(SCALES)]
            shown[scale % len(SCALES)] += len(visual) // tokens
            found["shown_pixels"] += sum(visual) // tokens
            done.add(kind)
        longest.append(lengths)
    if packing == "padded":
        found["padding"] = sum(max(each) * len(each) - sum(each) for each in zip(*longest, strict=True))
    return dict(found), shown
