"""Hand-off: every source of weights gives exactly its tensors, and nothing is missing in silence."""

import json
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from transformers import ConvNextConfig, ConvNextModel

from lit_mm import __version__, load
from lit_mm.data.images import ImageOptions
from lit_mm.hub.export import export
from lit_mm.hub.loading import run_of
from lit_mm.inference.answering import Model
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import InitFrom, open_weights, start_from
from lit_mm.training.parts import LLMPart, LoRA, Parts, apply_parts
from tests.helpers.models import tiny_llm, tiny_vlm
from tests.helpers.runs import fit


def other_vlm(**sizes):
    """The same shapes, other weights."""
    vlm = tiny_vlm(**sizes)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(1.0)
    return vlm


def same(ours, theirs, prefix="") -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items() if k.startswith(prefix))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    return exported_to(tmp_path_factory.mktemp("hand-off"), tiny_vlm(), tokenizer)


def exported_to(folder, vlm, tokenizer):
    """The folder of an export, with the projector's weights beside it in a file of their own."""
    export(Model(vlm, tokenizer, ImageOptions("keep", None)), folder / "export")
    save_file(vlm.projector.state_dict(), folder / "projector.safetensors")
    return folder / "export"


def test_an_export_comes_back_whole(exported):
    vlm = other_vlm()
    start_from(vlm, InitFrom(str(exported)))
    assert same(vlm, tiny_vlm())


@pytest.mark.parametrize(
    ("part", "source"),
    [("encoder", "export"), ("projector", "export"), ("llm", "export"), ("projector", "projector.safetensors")],
)
def test_one_part_alone_comes_from_a_source(exported, part, source):
    vlm = other_vlm()
    start_from(vlm, InitFrom(**{part: str(exported.parent / source)}))
    others = [name for name in ("encoder", "projector", "llm") if name != part]
    assert same(vlm, tiny_vlm(), f"{part}.")
    assert all(same(vlm, other_vlm(), f"{name}.") for name in others)


def test_an_export_of_an_older_version_comes_back_whole(tmp_path, tokenizer):
    """Which had a file for the encoder, one for the projector, and transformers' LLM."""
    theirs, vlm = tiny_vlm(), other_vlm()
    for part in ("encoder", "projector"):
        state = {name: tensor.contiguous() for name, tensor in getattr(theirs, part).state_dict().items()}
        save_file(state, tmp_path / f"{part}.safetensors")
    theirs.llm.save_pretrained(tmp_path / "llm")
    start_from(vlm, InitFrom(str(tmp_path)))
    assert same(vlm, theirs)


def test_a_part_of_its_own_beats_the_runs(exported, tmp_path):
    tensors = load_file(exported.parent / "projector.safetensors")
    save_file({k: v + 7 for k, v in tensors.items()}, tmp_path / "p.safetensors")
    vlm = other_vlm()
    start_from(vlm, InitFrom(str(exported), projector=str(tmp_path / "p.safetensors")))
    assert same(vlm, tiny_vlm(), "llm.")
    assert torch.equal(vlm.projector.layers[0].weight, tiny_vlm().projector.layers[0].weight + 7)


def test_tied_embeddings_survive(tmp_path, tokenizer):
    vlm = other_vlm(tie_word_embeddings=True)
    start_from(vlm, InitFrom(str(exported_to(tmp_path, tiny_vlm(tie_word_embeddings=True), tokenizer))))
    assert same(vlm, tiny_vlm(tie_word_embeddings=True))
    assert vlm.llm.lm_head.weight is vlm.llm.model.embed_tokens.weight


def adapted_vlm():
    """With adapters that are not zero."""
    vlm = tiny_vlm()
    apply_parts(vlm, Parts(llm=LLMPart(lora=LoRA(4, 8, 0.0))))
    for name, parameter in vlm.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return vlm


def test_a_run_and_its_checkpoint_are_sources(instruction_set, tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    caplog.set_level("INFO", "lightning.fabric.utilities.rank_zero")
    lit, trainer = fit(instruction_set, tmp_path, max_steps=1, limit_val_batches=0)
    run = tmp_path / "lightning_logs/version_0"
    trainer.save_checkpoint(run / "checkpoints/last.ckpt")
    for source in (run, tmp_path / "lightning_logs", run / "checkpoints/last.ckpt"):
        vlm = other_vlm()
        start_from(vlm, InitFrom(str(source)))
        assert same(vlm, lit.vlm), source
    assert not same(lit.vlm, tiny_vlm())
    told = f"init_from: {run} is {run / 'checkpoints/last.ckpt'}"
    assert [record.message for record in caplog.records].count(told) == 1, "three parts open it"


def test_missing_and_unexpected_names_are_listed(exported, tmp_path):
    tensors = load_file(exported.parent / "projector.safetensors")
    weight = tensors.pop("layers.0.weight")
    save_file({**tensors, "layers.9.weight": weight}, tmp_path / "p.safetensors")
    init = InitFrom(projector=str(tmp_path / "p.safetensors"))
    with pytest.raises(ValueError, match=r"1 missing: projector.layers.0.weight; 1 unexpected: projector.layers.9.wei"):
        start_from(other_vlm(), init)
    init.allow_missing, init.allow_unexpected = ["projector.layers.0.*"], ["projector.layers.9.*"]
    vlm = other_vlm()
    start_from(vlm, init)
    assert torch.equal(vlm.projector.layers[0].weight, other_vlm().projector.layers[0].weight)
    assert torch.equal(vlm.projector.layers[2].weight, tiny_vlm().projector.layers[2].weight)


def test_another_shape_is_refused(exported, tmp_path):
    tensors = load_file(exported.parent / "projector.safetensors") | {"layers.2.bias": torch.zeros(31)}
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.bias is \[31\], expected \[32\]"):
        start_from(other_vlm(), InitFrom(projector=str(tmp_path / "p.safetensors")))


def test_whole_numbers_are_no_weights(exported, tmp_path):
    tensors = load_file(exported.parent / "projector.safetensors") | {
        "layers.2.bias": torch.zeros(32, dtype=torch.int8)
    }
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.bias is torch.int8, expected floating point"):
        start_from(other_vlm(), InitFrom(projector=str(tmp_path / "p.safetensors")))


def test_an_untied_head_is_not_dropped_for_a_tied_one(exported):
    with pytest.raises(ValueError, match=r"1 unexpected: llm.lm_head.weight"):
        start_from(other_vlm(tie_word_embeddings=True), InitFrom(str(exported)))


def adapted(tmp_path, **trained):
    """A model with adapters, and its checkpoint."""
    vlm = adapted_vlm()
    state = {f"vlm.{k}": v for k, v in vlm.state_dict().items()}
    torch.save({"state_dict": state, "trained": trained}, tmp_path / "lora.ckpt")
    dcp.save({"state_dict": state}, checkpoint_id=tmp_path / "sharded.ckpt", no_dist=True)
    torch.save({"trained": trained}, tmp_path / "sharded.ckpt/meta.pt")
    return vlm


@pytest.mark.parametrize("run", ["lora.ckpt", "sharded.ckpt"])
def test_a_run_with_adapters_is_handed_over(tmp_path, run):
    theirs, ours = adapted(tmp_path, **{"lora rank": 4, "lora alpha": 8}), other_vlm()
    start_from(ours, InitFrom(str(tmp_path / run)))
    ids = torch.arange(9)[None]
    assert torch.allclose(ours.llm(ids).logits, theirs.llm(ids).logits, atol=1e-5)
    assert not torch.allclose(ours.llm(ids).logits, tiny_vlm().llm(ids).logits, atol=1e-2)


def test_adapters_of_unknown_strength_are_named_as_such(tmp_path):
    adapted(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the llm \(adapters: `export` merges them\)"):
        start_from(other_vlm(), InitFrom(str(tmp_path / "lora.ckpt")))


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere", "no file or folder"), (".", "expected a file or folder of")]
)
def test_no_source(tmp_path, source, message):
    with pytest.raises(FileNotFoundError, match=message):
        open_weights(str(tmp_path / source))


def test_a_pickle_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": Harm()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt holds more than tensors \(pickled code\), which is not loaded"):
        open_weights(str(tmp_path / "bad.ckpt"))
    assert not (tmp_path / "harm").exists()


def tower(width: int) -> tuple[ConvNextModel, ConvNeXtEncoder]:
    """transformers' model with five stages at random, and an encoder of these shapes."""
    dims, depths = [8, 16, 24, 32, width], [1, 1, 2, 1, 2]
    torch.manual_seed(2)
    theirs = ConvNextModel(ConvNextConfig(hidden_sizes=dims, depths=depths, num_stages=5, layer_norm_eps=1e-6)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    overrides = {"depths": depths[:4], "dims": dims[:4], "conv_mlp": False}
    return theirs, ConvNeXtEncoder("convnext_atto", [ExtraStage(2, width)], overrides=overrides).eval()


def assert_same_grid(encoder: ConvNeXtEncoder, theirs: ConvNextModel) -> None:
    pixels = torch.randn(1, 3, 128, 128)
    assert torch.allclose(encoder(pixels), theirs(pixels).last_hidden_state, atol=1e-4)


def test_the_published_towers_names(tmp_path):
    """ConvLLaVA publishes its towers as transformers' ConvNextModel with five stages."""
    (theirs, encoder), vlm = tower(40), tiny_vlm()
    theirs.save_pretrained(tmp_path)
    vlm.encoder, vlm.projector = encoder, MatryoshkaProjector(40, 32, [4, 1])
    start_from(vlm, InitFrom(encoder=str(tmp_path)))
    assert_same_grid(encoder, theirs)


@pytest.mark.parametrize("prefix", ["", "vision_tower.", "model."])
def test_a_tower_saved_beside_convllavas_main_files(tmp_path, prefix):
    """As ConvLLaVA saves what it trained: vision_tower/pytorch_model.bin, and the LLM with the projector."""
    source, ours = tiny_vlm(), other_vlm()
    theirs, ours.encoder = tower(24)
    (tmp_path / "vision_tower").mkdir()
    torch.save({prefix + k: v for k, v in theirs.state_dict().items()}, tmp_path / "vision_tower/pytorch_model.bin")
    torch.save(published_llava(source), tmp_path / "pytorch_model.bin")
    start_from(ours, InitFrom(str(tmp_path)))
    assert same(ours, source, "llm.") and same(ours, source, "projector.")
    assert_same_grid(ours.encoder, theirs)


def published_llava(vlm) -> dict[str, torch.Tensor]:
    """The LLM's names as they are, the projector inside."""
    projector = {f"model.mm_projector.{k.removeprefix('layers.')}": v for k, v in vlm.projector.state_dict().items()}
    return dict(vlm.llm.state_dict()) | projector


def test_the_published_llavas_names(tmp_path):
    """LLaVA's and ConvLLaVA's models."""
    vlm = tiny_vlm()
    save_file({k: v.contiguous() for k, v in published_llava(vlm).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    found = other_vlm()
    start_from(found, InitFrom(projector=str(tmp_path), llm=str(tmp_path)))
    assert same(found, vlm, "llm.") and same(found, vlm, "projector.") and same(found, other_vlm(), "encoder.")


def test_the_fixture_differs():
    """Or every test above would pass without copying."""
    assert not any(same(other_vlm(), tiny_vlm(), part) for part in ("encoder.", "projector.", "llm."))
    assert isinstance(other_vlm(), MatryoshkaVLM) and tiny_llm().name_or_path == "LlamaConfig"


def test_older_models_in_bin_files(tmp_path):
    """LLaVA-1.5 is published as pytorch_model-00001-of-00002.bin, …."""
    state = dict(tiny_vlm().llm.state_dict())
    names = sorted(state)
    for number, own in enumerate((names[:5], names[5:])):
        torch.save({name: state[name] for name in own}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    found = other_vlm()
    start_from(found, InitFrom(llm=str(tmp_path)))
    assert same(found, tiny_vlm(), "llm.")


def in_chunks(folder, second: int) -> torch.Tensor:
    """A sharded checkpoint of a tensor with 5 rows, of which ranks wrote 3, 2 from row `second` on, and 0."""
    whole = torch.arange(20.0).view(5, 4)
    dcp.save({"state_dict": {"vlm.a": whole}}, checkpoint_id=folder, no_dist=True)
    torch.save({"trained": {}}, folder / "meta.pt")
    told = dcp.FileSystemReader(folder).read_metadata()
    [(index, info)] = told.storage_data.items()
    chunks, told.storage_data = told.state_dict_metadata[index.fqn].chunks, {}
    chunks.clear()
    for rank, (begin, rows) in enumerate(((0, 3), (second, 2), (5, 0))):
        torch.save(whole[begin : begin + rows].clone(), file := folder / f"__{rank}_0.distcp")
        offsets = torch.Size([begin, 0])
        chunks.append(ChunkStorageMetadata(offsets, torch.Size([rows, 4])))
        own = replace(info, relative_path=file.name, offset=0, length=file.stat().st_size)
        told.storage_data[MetadataIndex(index.fqn, offsets)] = own
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    return whole


def test_chunks_of_several_ranks_are_put_together_as_by_torch(tmp_path):
    whole, theirs = in_chunks(tmp_path, 3), {"state_dict": {"vlm.a": torch.zeros(5, 4)}}
    dcp.load(theirs, checkpoint_id=tmp_path, no_dist=True)
    ours = open_weights(str(tmp_path)).tensors["a"]()
    assert torch.equal(ours, theirs["state_dict"]["vlm.a"]) and torch.equal(ours, whole)


def test_chunks_that_leave_a_gap_are_refused(tmp_path):
    in_chunks(tmp_path, 2)
    with pytest.raises(ValueError, match=r"chunks of state_dict.vlm.a overlap"):
        open_weights(str(tmp_path)).tensors["a"]()


def told_otherwise(exported, folder, change):
    """A copy of an export with another `lit_mm` in its config."""
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["lit_mm"])
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("version", ["99.0", "99.0.1"])
def test_an_export_of_a_newer_version_says_so(exported, tmp_path, version):
    source = told_otherwise(exported, tmp_path / "new", lambda told: told.update(version=version, names=None))
    said = rf"new/config.json: version {version} of lit_mm wrote it, found {re.escape(__version__)}"
    for read in (load, open_weights, run_of):
        with pytest.raises(ValueError, match=said):
            read(source)


def test_fields_that_an_export_lacks_are_named(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())["lit_mm"]
    for name in sorted(config.keys() - {"router", "version"}):
        source = told_otherwise(exported, tmp_path / name, lambda told, name=name: told.pop(name))
        for read in (load, open_weights, run_of):
            with pytest.raises(ValueError, match=rf"{name}/config.json: lit_mm lacks {name};"):
                read(source)
    source = told_otherwise(exported, tmp_path / "other", lambda told: told.update(names={"base": "model"}))
    with pytest.raises(ValueError, match=r"lit_mm.names is .*, expected base and head"):
        open_weights(source)
    for name in ("router", "version"):  # an earlier version may not have written them
        assert load(told_otherwise(exported, tmp_path / name, lambda told, name=name: told.pop(name)), "cpu")


def test_other_files_of_an_export_that_lack_something(exported, tmp_path):
    source = told_otherwise(exported, tmp_path / "other", lambda told: None)
    (tmp_path / "other/processor_config.json").write_text('{"image_processor": {}}')
    with pytest.raises(ValueError, match=r"processor_config.json: image_processor is \{\}, expected image_options"):
        load(source, "cpu")
    file = tmp_path / "other/model.safetensors"
    save_file(load_file(file) | {"surprise": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"other: found the weight surprise, expected names that begin with"):
        open_weights(source)
