"""LitMatryoshka: the multimodal model as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_mm.costs.flops import Costs
from lit_mm.data.chat import Conversation
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.evaluation.benchmarks import Benchmark
from lit_mm.evaluation.metrics import METRICS, AnswerMetric
from lit_mm.evaluation.pictures import print_whole
from lit_mm.inference.decoding import Decoding, described, end_ids, settings
from lit_mm.inference.generation import Generated, generate
from lit_mm.model.attention import NAME, Attention
from lit_mm.model.batch import Batch
from lit_mm.model.encoder import Encoder
from lit_mm.model.llm import LLM, load_config, load_llm, packing_of, positions_of
from lit_mm.model.loss import Consistency
from lit_mm.model.packing import Packing
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.router import Router, RouterOptions
from lit_mm.model.scales import Pooling, Sampling, Scale, all_scales, check_scales, check_time_scales
from lit_mm.model.vlm import Losses, MatryoshkaVLM, num_answers
from lit_mm.training.check import check_packing, stand_in
from lit_mm.training.checkpoints import InitFrom, Weights, expected_names, llm_weights, start_from
from lit_mm.training.optim import FusedAdamW, MuonAdamW
from lit_mm.training.parts import Parts, apply_parts, parameter_groups, parts_table, with_parameters
from lit_mm.training.resume import Place, check_model, check_order, scales_in, seed_step, write_place
from lit_mm.training.saving import is_remote
from lit_mm.training.schedule import WarmupCosine
from lit_mm.training.steps import clip, refuse_hidden_scale, refuse_not_finite, refuse_unknown_metrics, set_options
from lit_mm.training.strategies import FSDP1, is_sharded, shard


class LitMatryoshka(LightningModule):
    """Encoder, Matryoshka projector and LLM, trained on the mean loss of all scales (M3)."""

    vlm: MatryoshkaVLM

    def __init__(
        self,
        encoder: Callable[[], Encoder],
        llm: LLM,
        scales: list[int],
        time_scales: list[int] | None = None,
        sampling: Sampling = "mean",
        pooling: Pooling = "exact",
        projector: Callable[[int, int, list[int], Sampling, Pooling], MatryoshkaProjector] = MatryoshkaProjector,
        packing: Packing | Literal["auto"] = "auto",
        attention: Attention = "branch",
        scales_per_step: int | Literal["all"] = "all",
        keep_finest: bool = False,
        consistency: Consistency | None = None,
        router: RouterOptions | None = None,
        parts: Parts = Parts(),  # noqa: B008 (read only)
        init_from: str | InitFrom | None = None,
        activation_checkpointing: list[Literal["encoder", "llm"]] = [],  # noqa: B006 (read only)
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = FusedAdamW,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        max_new_tokens: int = 32,
        decoding: Decoding = "greedy",
        init_gain: float | None = None,
    ) -> None:
        """Describe the model; it is built when the run starts.

        Args:
            encoder: Image encoder: ConvNeXtEncoder (ConvLLaVA's) or TimmEncoder (such as a ViT).
            llm: The causal LM with its tokenizer and chat template.
            scales: Visual tokens per image, or per frame of a video, finest first; each must divide
                the encoder's grid.
            time_scales: For video: the largest numbers of sets of neighboring frames, finest first; each must
                divide the one before. The model then trains on and answers at every scale with every time
                scale, named 8x16 for 8 sets of frames with 16 tokens each. null: frames are not pooled.
            sampling: How coarser tokens come from finer ones: mean (M3's), spatial or sequential.
            pooling: exact refuses images whose grid a scale does not divide; adaptive gives every scale to
                any grid that is large enough, by cutting it into boxes as equal as the next finer scale's
                borders allow.
            projector: Called with the channels of the grid, the LLM's width, scales, sampling and pooling.
            packing: How samples are laid out for the LLM. packed: all scales of all samples in one packed
                sequence; sequential: one scale after another, each recomputed in the backward pass, for the
                least memory; padded: one scale after another on padded samples. auto: packed. LLMs with
                attention windows, recurrent LLMs and untested ones always use padded.
            attention: The attention of a packed sequence. branch: one causal attention per branch, on any device;
                flex: FlexAttention (GPU).
            scales_per_step: How many scales (with time scales: combinations) are drawn at random for each
                training step, weighted so that the expected loss is the mean over all. all: every one, as in M3.
            keep_finest: Whether the finest scale takes part in every step when scales are drawn.
            consistency: Coarser scales also learn to answer as a finer one does; null: they do not.
            router: Train a small head that predicts at which scale a question should be answered, and nothing else:
                set init_from to a trained model. All scales then take part in every step.
            parts: Which parts train, from which stage on, and their learning rates.
            init_from: Weights to start from: an earlier run, or one source per part. This is not a resume;
                --ckpt_path restores everything and overrides this.
            activation_checkpointing: Parts whose blocks are recomputed in the backward pass instead of
                keeping their activations: less memory, a third more computation in them.
            optimizer: Called with the parameter groups; the parts set the learning rates.
            scheduler: Called with the optimizer and the number of steps of the whole run.
            max_new_tokens: The longest generated answer, in tokens.
            decoding: How answers are generated. greedy: the most likely token each time, whatever the LLM's
                generation_config says; of that only the end tokens are taken. own: with all its settings
                (sampling, beams, penalties), which is how others run this LLM.
            init_gain: For training from scratch: convolutions and linear layers of encoder and
                projector start with standard deviation init_gain / sqrt(fan-in). null keeps timm's
                0.02 and torch's default, which are too small for widths below a hundred to learn.
        """
        super().__init__()
        self.save_hyperparameters()
        self.build_encoder, self.build_projector, self.llm = encoder, projector, llm
        self.scales, self.sampling, self.pooling = check_scales(scales), sampling, pooling
        self.time_scales = check_time_scales(time_scales)
        self.attention, self.keep_finest = attention, keep_finest
        self.scales_per_step: int | Literal["all"] = "all" if router else scales_per_step
        self.router, self.consistency = router, None if router else consistency
        self.parts, self.build_optimizer, self.build_scheduler = parts, optimizer, scheduler
        self.init_from = InitFrom(init_from) if isinstance(init_from, str) else init_from or InitFrom()
        self.activation_checkpointing = activation_checkpointing
        self.max_new_tokens, self.decoding, self.init_gain = max_new_tokens, decoding, init_gain
        self.tokenizer = load_tokenizer(llm)
        config = load_config(llm, self.tokenizer)
        self.packing, self.positions = packing_of(config, packing), positions_of(config)
        self.end_id = Conversation(self.tokenizer).end_id
        self._check_options()
        self.metrics: dict[str, list[AnswerMetric]] = {}
        self.place, self._asked, self._trained_at = Place(), list[Scale](), list[Scale]()
        self.recent: list[tuple[list[str], Tensor]] = []

    def _check_options(self) -> None:
        """Refuse options that do not go together."""
        if self.consistency and (len(self.all_scales) < 2 or self.scales_per_step == 1):
            found = f"scales {', '.join(map(str, self.all_scales))}, scales_per_step {self.scales_per_step}"
            raise ValueError(f"model.consistency needs at least two scales in a step, found {found}")
        if self.router and (self.packing != "packed" or self.time_scales):
            found = f"packing {self.packing}, time_scales {self.time_scales}"
            raise ValueError(f"model.router: expected packing packed and no time scales, found {found}")
        if self.llm.quantize and not (self.parts.llm.frozen or self.parts.llm.lora or self.router):
            found = f"llm.quantize {self.llm.quantize}"
            raise ValueError(f"{found}: these weights cannot train: set parts.llm.frozen or .lora")

    @property
    def all_scales(self) -> list[Scale]:
        """All scales that the model can answer at, finest first: each scale with each time scale."""
        return all_scales(self.scales, self.time_scales)

    @property
    def asked_scales(self) -> list[Scale]:
        """The scales at which questions are answered."""
        return self._asked or self.all_scales

    @property
    def trained_scales(self) -> list[Scale]:
        """The scales that the weights were trained at: those of the checkpoint that is evaluated, otherwise all."""
        return self._trained_at or self.all_scales

    def ask_at(self, scales: Sequence[str | int] | str | int | None) -> None:
        """Answer at one or some of the model's scales only; None: at all of them.

        Raises:
            ValueError: The model does not have one of them.
        """
        scales = [scales] if isinstance(scales, str | int) else scales
        known = {str(scale): scale for scale in self.all_scales}
        if unknown := [str(scale) for scale in scales or [] if str(scale) not in known]:
            raise ValueError(f"--scales: {', '.join(unknown)} is not among the model's {', '.join(known)}")
        self._asked = [known[str(scale)] for scale in scales or []]

    @property
    def inputs(self) -> ModelInputs:
        """What the data needs to know about this model; no weights are created for it."""
        with torch.device("meta"):
            encoder = self.vlm.encoder if hasattr(self, "vlm") else self.build_encoder()
        color = tuple(int(255 * value) for value in encoder.mean)  # truncated, as in LLaVA
        return ModelInputs(
            self.tokenizer,
            encoder.stride,
            self.scales,
            cast(tuple[int, int, int], color),
            self.sampling,
            self.pooling,
            self.time_scales,
            self.packing,
            self.scales_per_step,
            self.keep_finest,
            self.positions,
            self.max_new_tokens,
            self.attention,
            self.router is not None,
        )

    def configure_model(self) -> None:
        """Build the model with its initial weights, freeze what does not train, and shard it if configured."""
        if hasattr(self, "vlm"):
            return
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            FSDP1()
        if self.llm.quantize and is_sharded(self._trainer):
            raise ValueError("llm.quantize: quantized weights are not sharded, use trainer.strategy ddp")
        if self.router and is_sharded(self._trainer) and self.trainer.state.fn == TrainerFn.FITTING:
            raise ValueError("model.router: it is not trained with a sharded model, use trainer.strategy ddp")
        direct = self._read_by_layer()
        self.vlm = self._build(on_meta=direct is not None)
        start_from(self.vlm, self.init_from)
        apply_parts(self.vlm, self.parts)
        self.vlm.set_grad_checkpointing(self.activation_checkpointing)
        if self._trainer is not None and self.trainer.precision == "bf16-true":
            self.vlm.to(torch.bfloat16)
        self.groups, self.table = parameter_groups(self.vlm, self.parts), parts_table(self.vlm, self.parts)
        self.costs = Costs.if_known(self.vlm, self.activation_checkpointing)  # sharded models cannot be counted
        self.vlm.sharded = is_sharded(self._trainer)
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.vlm, self.trainer.strategy.device_mesh["data_parallel"], self.trainer.strategy, direct)

    def _read_by_layer(self) -> Weights | None:
        """The weights of an LLM that is built on `meta` and loaded layer by layer while it is sharded, or None."""
        weights = llm_weights(self.llm, self.init_from.sources.get("llm")) if is_sharded(self._trainer) else None
        if weights is None:
            return None
        expected = expected_names(load_llm(self.llm, self.tokenizer, on_meta=True))
        return weights if set(expected) <= set(weights.tensors) else None  # other names: only transformers can map them

    def _build(self, on_meta: bool = False) -> MatryoshkaVLM:
        """The model with published or random weights; the LLM has none if on_meta."""
        encoder, llm = self.build_encoder(), load_llm(self.llm, self.tokenizer, on_meta)
        if self.packing != "padded":
            llm.set_attn_implementation(NAME)
        width = cast(nn.Embedding, llm.get_input_embeddings()).embedding_dim
        projector = self.build_projector(encoder.num_features, width, self.scales, self.sampling, self.pooling)
        router = Router(width, len(self.scales), self.router) if self.router else None
        vlm = MatryoshkaVLM(encoder, projector, llm, self.time_scales, router)
        if self.init_gain is not None:
            vlm.init_weights(self.init_gain)
        return vlm

    def on_fit_start(self) -> None:
        """Print what trains and how samples are packed."""
        if self.packing == "sequential" and is_sharded(self.trainer):
            raise ValueError("model.packing sequential: sharded ranks would run the LLM a different number of times")
        self.divisor: Tensor | None = None
        self.checked, self._trained_at = False, []
        folder = self.trainer.log_dir  # asked on every rank
        if self.trainer.is_global_zero:
            if folder and self.trainer.logger and not is_remote(folder):
                self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
            print_whole(self.table)
            rank_zero_info(f"packing: {self.packing} ({type(self.vlm.llm).__name__})")
        self.on_test_start()

    def on_validation_start(self) -> None:
        """Say how answers are generated; a fit has said it at its start."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_start()

    def on_test_start(self) -> None:
        """Say how answers are generated."""
        ends = ", ".join(f"{n} {self.tokenizer.decode([n])!r}" for n in end_ids(self.vlm.llm, [self.end_id]))
        how = described(self.vlm.llm, self.decoding)
        rank_zero_info(f"answers: {how}, at most {self.max_new_tokens} tokens, to one of {ends}")

    on_predict_start = on_test_start

    def on_train_epoch_start(self) -> None:
        """Start the epoch's place."""
        self.place.epoch, self.place.batches = self.trainer.current_epoch, 0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let random numbers and the logger's step depend on the place only."""
        seed_step(self.trainer.current_epoch, batch_idx, self.global_rank)
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean over scales of the next-token loss (M3, equation 1), over the labels of all ranks.

        Lightning divides by the number of accumulated batches and averages over ranks. All batches of an accumulation
        use the divisor of its first one, so that the sum is off by one factor only, which
        `on_before_optimizer_step` corrects.
        """
        if not self.checked:  # sharded models only compute within a step
            check_packing(self.vlm, self.packing, self.attention)
            self.checked = True
        window = self.trainer.accumulate_grad_batches
        num_labels, encodings = self._over_ranks(batch)
        if batch_idx % window == 0 or self.divisor is None:  # or resumed within an accumulation
            self.divisor, self.num_labels = num_labels.clamp(min=1) * window, torch.zeros_like(num_labels)
        self.num_labels += num_labels
        consistency = self.consistency if self.place.steps >= getattr(self.consistency, "start", 0) else None
        count = self.divisor / (window * self.trainer.world_size)
        losses = self.vlm(batch, count, encodings, consistency=consistency)
        self.recent = [
            *(self.recent if batch_idx % window else []),
            (getattr(batch, "where", []), losses.loss.detach()),
        ]
        self._log_losses("train", losses, batch)
        return losses.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the number of accumulated labels."""
        if self.trainer.accumulate_grad_batches > 1 and self.divisor is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, self.divisor / self.num_labels.clamp(min=1))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients and log their norm.

        Raises:
            FloatingPointError: The norm is not finite. The records of the step are then written to a file.
        """
        norm = clip(optimizer, gradient_clip_val, gradient_clip_algorithm)
        refuse_not_finite(norm, self.trainer, self.recent)
        self.log("train/gradient_norm", norm)

    def optimizer_step(self, epoch: int, batch_idx: int, *arguments: Any, **named: Any) -> None:
        """Step, and keep the place that the weights have reached."""
        super().optimizer_step(epoch, batch_idx, *arguments, **named)
        self.place = Place(epoch, batch_idx + 1, self.place.steps + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the place that the weights have reached, whatever the state of Lightning's loops.

        The hyperparameters of a module made in Python are objects; leaving them out avoids pickled code.
        """
        if "_instantiator" not in checkpoint.get("hyper_parameters", {}):
            checkpoint.pop("hyper_parameters", None)
        if self._trainer is not None and "loops" in checkpoint:
            checkpoint["order"], checkpoint["trained"] = self._order(), self._trained()
            checkpoint["identity"], checkpoint["answering"] = self._identity(), self._answering()
            write_place(checkpoint, self.place, int(self.trainer.num_training_batches))

    def _answering(self) -> dict[str, Any]:
        """How the data module brings images and videos to size, for whoever answers with this checkpoint later."""
        data = getattr(self.trainer, "datamodule", None)
        options = {name: getattr(data, name, None) for name in ("image", "video", "frame")}
        told: dict[str, Any] = {name: vars(own) if own else None for name, own in options.items()}
        return {"image_first": bool(getattr(data, "image_first", False)), **{n: v for n, v in told.items() if v}}

    def _identity(self) -> dict[str, Any]:
        """The settings that change what the same weights compute."""
        named = {name: getattr(self, name) for name in ("scales", "time_scales", "sampling", "pooling")}
        router = vars(self.router) if self.router else None
        return named | {"chat template": self.tokenizer.chat_template, "router": router}

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load weights, with a shorter error than torch's.

        Raises:
            ValueError: The weights are those of another model.
        """
        try:
            return super().load_state_dict(*arguments, **options)
        except RuntimeError as error:
            lines = [f"{line.strip():.300}" for line in str(error).splitlines()]
            said = lines[1:] or lines  # the first line only names the class
            more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
            raise ValueError(f"--ckpt_path: the checkpoint is of another model: {' '.join(said[:3])}{more}") from None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the checkpoint's place; an evaluation is logged at its last step.

        Raises:
            ValueError: It is a checkpoint of another model, of other trained parts, or of other batches in the
                middle of an epoch, or this version did not write it.
        """
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "place" not in checkpoint:
            raise ValueError(f"{self.trainer.ckpt_path}: holds no position in the data, so it cannot be resumed")
        if fitting and checkpoint.get("trained") != self._trained():
            raise ValueError(
                f"{self.trainer.ckpt_path}: trained {checkpoint.get('trained')}, model.parts now trains "
                f"{self._trained()}: resume with the same model.parts, or start a new run with --model.init_from"
            )
        check_model(identity := checkpoint.get("identity", {}), self._identity())
        self._trained_at = scales_in(identity) if identity and not fitting else []
        self.place = Place(**checkpoint.get("place", {}))
        if fitting:
            check_order(checkpoint["order"], self._order(), self.place)
        elif self._trainer is not None:
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, self.place.steps - 1)

    def on_train_start(self) -> None:
        """Run the checks that need the loaders and the optimizer."""
        self.place.steps = self.trainer.global_step  # 0 for a module from another fit or from load_from_checkpoint
        refuse_hidden_scale(self.trainer)
        refuse_unknown_metrics(self.trainer, self.metric_names())
        set_options(self.trainer, self.options)

    def metric_names(self) -> list[str]:
        """The metrics that a fit logs and callbacks can monitor; `val/…` only with validation data."""
        names = ["epoch", "step", "train/loss", *(f"train/loss@{scale}" for scale in self.all_scales)]
        if self.consistency:
            names += ["train/consistency", *(f"train/consistency@{scale}" for scale in self.all_scales[1:])]
        names += ["train/gradient_norm", *(["train/router_loss"] if self.router else [])]
        if sum(self.trainer.num_val_batches):
            names += ["val/router_loss"] if self.router else []
            names += ["val/loss", *(f"val/loss@{scale}" for scale in self.all_scales)]
            names += [f"val/accuracy@{scale}" for scale in self.asked_scales]
        return names

    def _trained(self) -> dict[str, int]:
        """The number of parameters in each group, and the shape of the LLM's adapters."""
        trained = {group["name"]: len(group["params"]) for group in self.groups}
        if lora := self.parts.llm.lora:
            trained |= {"lora rank": lora.r, "lora alpha": lora.lora_alpha}
        return trained

    def _order(self) -> dict[str, Any]:
        """The settings that decide the batches, if the data module reports them."""
        data = getattr(self.trainer, "datamodule", None)
        return cast(Any, data).order() if hasattr(data, "order") else {}

    def _over_ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """The number of labels on all ranks (for a router, of answers), and how often every rank must run its encoder:
        once for each image size of the rank that has the most sizes."""
        count = (num_answers(batch) or 0) if self.router else batch.num_labels
        own = torch.tensor([count, max(1, len(batch.images.groups))], device=self.device)
        if self.trainer.world_size == 1:
            return own[0].float(), 1  # 1, so that the loss depends on the encoder also without images
        labels, encodings = cast(Tensor, self.all_gather(own)).unbind(1)
        return labels.sum().float(), int(encodings.max())

    def _encodings(self, batch: Batch) -> int:
        """How often every rank must run its encoder in evaluation, where only sharded ranks wait for each other."""
        return self._over_ranks(batch)[1] if self.vlm.sharded else 0

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Log losses and judge answers at every scale, and return these; a rank that is out of records logs with
        weight 0."""
        nothing = torch.zeros(len(self.all_scales), device=self.device)
        losses, encodings = Losses(nothing.sum(), nothing), self._encodings(batch)
        if batch.input_ids:
            losses = self.vlm(batch, encodings=encodings)
        elif self.vlm.sharded:
            self.vlm(stand_in(batch, self.scales, self.packing, self.device), encodings=encodings)
        self._log_losses("val", losses, batch)
        return self.judge("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Judge the answers at every scale by the metric of their set; return them as `answers`."""
        return self.judge(self.test_names[dataloader_idx], batch)

    @property
    def test_names(self) -> list[str]:
        """The test sets: `test`, or `test/docvqa`, …."""
        return list(getattr(getattr(self.trainer, "datamodule", None), "tests", ["test"]))

    def benchmark(self, name: str) -> Benchmark | None:
        """The benchmark that a set of the data module is; None for a plain file."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return data.benchmark(name) if hasattr(data, "benchmark") else None

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dict for each question: question_id, prompt, and by scale the answers as `Generated`."""
        answers = zip(batch.questions, self.answers(batch, "predict"), strict=True)
        return [
            {"question_id": q.record, "prompt": q.text, "answers": dict(zip(self.asked_scales, own, strict=True))}
            for q, own in answers
        ]

    def answers(self, batch: Batch, name: str = "") -> list[list[Generated]]:
        """Generated answers to each of the batch's questions, at each of the asked scales, all in one batch.

        Args:
            batch: The questions.
            name: The set that they are of; a benchmark may have its own max_new_tokens.
        """
        benchmark = self.benchmark(name) if name else None
        most = (benchmark and benchmark.max_new_tokens) or self.max_new_tokens
        config = settings(self.vlm.llm, self.decoding, max_new_tokens=most)
        answers = generate(
            self.vlm,
            batch.images,
            batch.questions,
            self.asked_scales,
            config,
            [self.end_id],
            self.tokenizer,
            encodings=self._encodings(batch),
        )
        asked = zip(batch.questions, answers, strict=True)
        if broken := [str(q.record) for q, own in asked if any(answer.finish == "error" for answer in own)]:
            rank_zero_warn(f"logits that are not finite, answers count as wrong: questions {', '.join(broken)}")
        return answers

    def judge(self, name: str, batch: Batch) -> dict[str, Any]:
        """Answer questions of a set and count the answers by its metric, until `figures`; return them as `answers`."""
        answers, metrics = self.answers(batch, name), self._metrics_of(name)
        references = [question.references or ("",) for question in batch.questions]
        for place, metric in enumerate(metrics):
            metric.update([own[place].text for own in answers], references)
        return {"answers": answers}

    def _metrics_of(self, name: str) -> list[AnswerMetric]:
        """The metric of a set, once for each of the asked scales."""
        if name not in self.metrics:
            benchmark = self.benchmark(name)
            kind = METRICS[benchmark.metric if benchmark else "exact"]
            self.metrics[name] = [kind().to(self.device) for _ in self.asked_scales]
        return self.metrics[name]

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        self.log_dict(self.figures("val"), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the headline figure of every test set at every scale: `test/accuracy@16`, or `test/docvqa@16`."""
        for name in self.test_names:
            self.log_dict(self.figures(name), sync_dist=True)

    def figures(self, name: str) -> dict[str, Tensor]:
        """The figures of a set's answers over all ranks, which must all call this: `val/accuracy@16`, or
        `test/docvqa@16`, …, and a metric's further figures. The next `judge` begins anew."""
        found: dict[str, Tensor] = {}
        for scale, metric in zip(self.asked_scales, self._metrics_of(name), strict=True):
            values = {name if "/" in name else f"{name}/accuracy": metric.compute().float()}  # the same on all ranks
            values |= {f"{name}/{figure}": torch.tensor(value) for figure, value in metric.figures().items()}
            found |= {f"{figure}@{scale}": value for figure, value in values.items()}
        del self.metrics[name]
        return found

    def _log_losses(self, split: Literal["train", "val"], losses: Losses, batch: Batch) -> None:
        """Log the mean losses of this rank's batch: `train/loss`, and `train/loss@16`, … of the drawn scales. With
        consistency also what it adds to these, `train/consistency` and `train/consistency@4`, ….

        Epoch means are weighted by the number of labels, times the ranks because Lightning divides it in integers.
        """
        drawn = [number for number, weight in enumerate(batch.scale_weights) if weight]
        values = {f"{split}/loss@{self.all_scales[number]}": losses.per_scale[number] for number in drawn}
        training, count = split == "train", batch.num_labels * self.trainer.world_size
        self.log(f"{split}/loss", losses.per_scale[drawn].mean(), batch_size=count, sync_dist=not training)
        self.log_dict(values, prog_bar=training, batch_size=count, sync_dist=not training)
        if losses.consistency is not None:
            terms = losses.consistency
            self.log("train/consistency", terms[drawn].mean(), batch_size=count)
            self.log_dict({f"train/consistency@{self.all_scales[n]}": terms[n] for n in drawn[1:]}, batch_size=count)
        if self.router:
            self.log(f"{split}/router_loss", losses.loss, batch_size=count, prog_bar=True, sync_dist=not training)

    def configure_optimizers(self) -> Any:
        """The configured optimizer with the parameter groups of the parts, and the schedule, updated every step."""
        optimizer = self.build_optimizer(with_parameters(self.groups, self.vlm))
        if isinstance(optimizer, MuonAdamW) and is_sharded(self.trainer):
            raise ValueError("model.optimizer MuonAdamW needs whole matrices: shard with FusedAdamW")
        self.options = [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]
        scheduler = self.build_scheduler(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run: the smaller of max_steps and the steps of max_epochs.

        `estimated_stepping_batches` would restart the data on resume.

        Raises:
            ValueError: Neither max_steps nor max_epochs bounds the run.
        """
        most, epochs, limit = self.trainer.max_steps, self.trainer.max_epochs, self.trainer.limit_train_batches
        steps = 0
        if epochs is None or epochs < 0:
            if most < 0:
                raise ValueError("set trainer.max_steps or trainer.max_epochs: the schedule needs the run's length")
            return most
        for epoch in range(epochs):
            if 0 <= most <= steps:
                return most
            batches = len(cast(Any, self.trainer).datamodule.train_plans(epoch))
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            steps += math.ceil(batches / self.trainer.accumulate_grad_batches)
        return min(steps, most) if most >= 0 else steps
