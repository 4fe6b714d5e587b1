"""What a batch is: samples, their images, and the packed sequences made of them.

A sample is `input_ids` with one IMAGE for each image (or frame of a video), and `labels` that are
IGNORE_INDEX where nothing is trained. At a scale of s tokens every IMAGE becomes s positions, which the
model fills with that image's tokens.

With time scales, only the first frame of each set of frames keeps its place in the text, and stands for the
mean of the set. `time_scale` gives the coarsest time scale at which each position is still there.
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
    """How the images of a batch are grouped at one time scale; a still image is a set of its own.

    Args:
        index: [N] the set that each image belongs to.
        sizes: [n] the number of images in each set.
    """

    index: Tensor
    sizes: Tensor


@dataclass
class Images:
    """The distinct images of a batch, grouped by size so that each group is one tensor.

    Args:
        groups: uint8 pixels [n, 3, H, W], one tensor per size; empty without images.
        order: [N] the index of image i in the concatenation of the groups.
        frame_sets: The sets of frames at every time scale, finest first; empty without time scales.
        frames: How many of the N are frames of videos.
    """

    groups: list[Tensor]
    order: Tensor
    frame_sets: list[FrameSets] = field(default_factory=list)
    frames: int = 0

    def nested_rows(self) -> list[Tensor]:
        """For every time scale [N]: the row of `MatryoshkaVLM.encode`'s output for each image, or for its set."""
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
        input_ids: [T] the prompt, with one IMAGE for each image.
        image_index: The batch's images that these mean, in order.
        references: The accepted answers; empty where there are none (predict).
        type: The question's type, by which accuracies are broken down; may be "".
        group: Questions of the same group are scored together (MME); may be "".
        time_scale: [T] as in a Batch; None without time scales.
    """

    record: str | int
    text: str
    input_ids: Tensor
    image_index: list[int]
    references: tuple[str, ...] = ()
    type: str = ""
    group: str = ""
    time_scale: Tensor | None = None


@dataclass
class Answers:
    """The A answers after an image in a packed sequence with the coarsest scale: what a router learns from.

    Args:
        of_label: [S] the answer that each label is of; A for labels before the first image.
        first: [A] the label that begins each answer at the coarsest scale.
        seen: [P] the nested tokens that the prompts show at the coarsest scale, as in `PackedSequence.visual_source`.
        of_seen: [P] the answer whose prompt shows them.
    """

    of_label: Tensor
    first: Tensor
    seen: Tensor
    of_seen: Tensor


@dataclass
class PackedSequence:
    """Samples laid out for one run of the LLM: L positions, V of them visual, S with a label.

    Args:
        input_ids: [L], 0 at visual positions.
        position_ids: [L]; each branch continues from the end of its prefix.
        visual_index: [V] the visual positions.
        visual_source: [V] the nested token at each visual position, as an index into the output of
            `MatryoshkaVLM.encode` [M, sum of scales, D] flattened to [M × sum of scales, D].
        label_index: [S] the positions whose hidden state predicts a label.
        labels: [S] token ids.
        label_scales: [S, scales] bool: the scales whose loss a label counts in.
        label_sample: [S] the sample that each label comes from.
        label_place: [S] each label's place in the batch's samples laid end to end; equal at all scales.
        layout: Which positions attend to which.
        counts: Numbers of positions and of attention pairs.
        answers: Its answers, if a router is trained.
    """

    input_ids: Tensor
    position_ids: Tensor
    visual_index: Tensor
    visual_source: Tensor
    label_index: Tensor
    labels: Tensor
    label_scales: Tensor
    label_sample: Tensor
    label_place: Tensor
    layout: Layout
    counts: Counts
    answers: Answers | None = None


@dataclass
class Prompts:
    """Size of a batch's prompts at one scale.

    Args:
        text: Positions of text in all prompts together.
        visual: Positions of visual tokens.
        pairs: Query-key pairs of causal attention.
    """

    text: int = 0
    visual: int = 0
    pairs: int = 0


@dataclass
class Counts:
    """Size of a batch, over all scales of the step.

    Args:
        text: Positions of text that the LLM computes.
        visual: Positions of visual tokens.
        labels: Positions with a loss.
        padding: Positions that only fill samples up to the longest (packing `padded`).
        pairs: Query-key pairs that attention computes.
        shown: [image scales] how many images (or sets of frames) are shown with each number of tokens.
        shown_pixels: Pixels of the images shown, counted once for every time they are shown.
        prompts: [scales] the questions at every scale; empty without questions.
        asked: (number, height, width) of the images that the questions show, counted once per question.
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
        input_ids: [T_i] for each sample: ids with one IMAGE for each image.
        labels: [T_i] for each sample: the ids where supervised, else IGNORE_INDEX.
        image_index: [K] the image that each of the K IMAGE ids means, over all samples in order.
        scale_weights: [scales] coefficient of each scale's loss in the step's loss, finest first; 0 for a
            scale that takes no part. In M3 all are 1 / scales; where scales are drawn, their mean over
            steps must be that.
        packed: The samples as one packed sequence, or one per scale; empty for packing `padded`.
        questions: The prompts of validation, test and predict.
        time_scale: [T_i] for each sample: the index of the coarsest time scale at which a position is
            still there; empty without time scales.
        num_labels: Number of labels, counted once whatever the number of scales; -1: counted here.
        counts: Size of the batch; None where it was not counted.
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
