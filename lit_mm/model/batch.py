"""What a batch is: samples, their images, and the packed sequences made of them.

A sample is `input_ids` in which IMAGE stands once for each image (or frame of a video), with `labels` that
are IGNORE_INDEX where nothing is trained. At a scale of s tokens every IMAGE becomes s positions, which the
model fills with that image's tokens.

With time scales, only the first frame of each set of frames keeps its place in the text, with the set's mean.
`time_scale` says of every position up to which time scale it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lit_mm.model.attention import Layout

IMAGE = -200
"""The id that stands for one image in input_ids (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORE_INDEX = -100
"""The label of positions without a loss."""


@dataclass
class FrameSets:
    """How all images of a batch are grouped at one time scale; a still image is a set of its own.

    Args:
        index: [N] the set of every image.
        sizes: [n] how many images each set has.
    """

    index: Tensor
    sizes: Tensor


@dataclass
class Images:
    """Distinct images, grouped by size so that each group is one tensor.

    Args:
        groups: uint8 pixels [n, 3, H, W], one tensor a size; empty without images.
        order: [N] where image i stands in the concatenation of the groups.
        frame_sets: The sets of frames at every time scale, finest first; empty without time scales.
        frames: How many of the N are frames of videos.
    """

    groups: list[Tensor]
    order: Tensor
    frame_sets: list[FrameSets] = field(default_factory=list)
    frames: int = 0

    def nested_rows(self) -> list[Tensor]:
        """For every time scale [N]: the row of `MatryoshkaVLM.encode`'s tokens that holds each image or its set."""
        if not self.frame_sets:
            return [torch.arange(len(self.order), device=self.order.device)]
        firsts = accumulate((len(sets.sizes) for sets in self.frame_sets), initial=0)
        return [first + sets.index for first, sets in zip(firsts, self.frame_sets, strict=False)]


@dataclass
class Question:
    """One prompt to be answered by generation.

    Args:
        record: The record's id.
        text: The question as asked, for reports.
        input_ids: [T] the prompt, IMAGE once for each image.
        image_index: Which images of the batch stand there, in order.
        answer: The expected answer; None where there is none (predict).
        time_scale: [T] as in a Batch; None without time scales.
    """

    record: str | int
    text: str
    input_ids: Tensor
    image_index: list[int]
    answer: str | None = None
    time_scale: Tensor | None = None


@dataclass
class PackedSequence:
    """Samples laid out for one run of the LLM: L positions, V of them visual, S with a label.

    Args:
        input_ids: [L], 0 at visual positions.
        position_ids: [L], going on from the prefix's end in each branch.
        visual_index: [V] the visual positions.
        visual_source: [V] which of the nested tokens each takes, an index into `MatryoshkaVLM.encode`'s
            tokens [M, sum of scales, D] flattened to [M × sum of scales, D].
        label_index: [S] the positions whose hidden state predicts a label.
        labels: [S] token ids.
        label_scales: [S, scales] bool: the scales whose loss a label belongs to.
        label_sample: [S] the label's sample.
        layout: Who sees whom, for the LLM's attention.
        counts: What it holds.
    """

    input_ids: Tensor
    position_ids: Tensor
    visual_index: Tensor
    visual_source: Tensor
    label_index: Tensor
    labels: Tensor
    label_scales: Tensor
    label_sample: Tensor
    layout: Layout
    counts: Counts


@dataclass
class Prompts:
    """Questions at one scale.

    Args:
        text: Positions of text of all prompts together.
        visual: Positions of visual tokens.
        pairs: Pairs of a query and a key that causal attention sees.
    """

    text: int = 0
    visual: int = 0
    pairs: int = 0


@dataclass
class Counts:
    """What a batch holds, in numbers, all scales of the step together.

    Args:
        text: Positions of text that the LLM computes.
        visual: Positions of visual tokens.
        labels: Positions with a loss.
        padding: Positions that only fill samples up to the longest (`padded`).
        pairs: Pairs of a query and a key that attention sees.
        shown: [image scales] how often an image, or a set of frames, stands there with so many tokens.
        shown_pixels: Pixels of what visual tokens stand for, each image as often as it stands there.
        prompts: [scales] the questions at every scale; empty without questions.
        asked: (number, height, width) of the images that the questions show, each as often as it is asked about.
    """

    text: int = 0
    visual: int = 0
    labels: int = 0
    padding: int = 0
    pairs: int = 0
    shown: list[int] = field(default_factory=list)
    shown_pixels: int = 0
    prompts: list[Prompts] = field(default_factory=list)
    asked: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Batch:
    """Samples with their images.

    Args:
        images: The distinct images of all samples and questions.
        input_ids: [T_i] a sample: ids with IMAGE once for each image.
        labels: [T_i] a sample: the ids where supervised, else IGNORE_INDEX.
        image_index: [K] which image each of the K IMAGE ids means, over all samples in order.
        scale_weights: [scales] coefficient of each scale's loss in the step's loss, finest first; 0 for a
            scale that does not take part. M3's is 1 / scales for all. Where scales are drawn, the mean over
            steps must be that.
        packed: The samples packed: one sequence, or one a scale; empty for an LLM that cannot be packed.
        questions: What validation, test and predict ask.
        time_scale: [T_i] a sample: the index of the coarsest time scale at which a position still stands;
            empty without time scales.
        num_labels: Number of labels, each counted once however many scales there are; counted here.
        counts: What is in it, counted on the CPU; None where nobody did.
    """

    images: Images
    input_ids: list[Tensor]
    labels: list[Tensor]
    image_index: Tensor
    scale_weights: list[float] = field(default_factory=list)
    packed: list[PackedSequence] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    time_scale: list[Tensor] = field(default_factory=list)
    num_labels: int = -1
    counts: Counts | None = None

    def __post_init__(self) -> None:
        if self.num_labels < 0:
            self.num_labels = sum(int((labels[1:] != IGNORE_INDEX).sum()) for labels in self.labels)
