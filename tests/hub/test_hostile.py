"""Files of weights that lie are refused before anything runs, is allocated, or is read from elsewhere."""

from __future__ import annotations

import collections
import json
import pickle
import resource
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from lit_mm.hub.describe import encoder_config
from lit_mm.hub.huggingface.configuration_lit_mm import LitMMVisionConfig
from lit_mm.hub.huggingface.modeling_lit_mm import build_encoder
from lit_mm.hub.importers import main
from lit_mm.hub.layouts import open_source
from lit_mm.hub.reading import read_file, read_folder
from lit_mm.model.encoder import TimmEncoder
from lit_mm.training.checkpoints import is_of_fsdp1, open_weights
from tests.helpers.foreign import clip_tower, convnext_tower, llava, write_folder

HUGE = 10**12


@pytest.fixture(autouse=True)
def little_memory():
    """Whoever allocates 10¹² bytes fails, whatever the system promises."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (HUGE // 4, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def header(file: Path, text: str, data: bytes = b"") -> Path:
    """A safetensors file with this header."""
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
    return file


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (json.dumps({"a": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}), b""),
        (json.dumps({"a": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}}), bytes(4)),
        (json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}), bytes(4)),
        (json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), bytes(4)),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        ("[" * 100_000, b""),
        ("{}" + " " * 100, b"left over"),
    ],
)
def test_safetensors_that_lie(tmp_path, text, data):
    file = header(tmp_path / "a.safetensors", text, data)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_file(file)


def test_a_header_longer_than_its_file(tmp_path):
    file = tmp_path / "a.safetensors"
    for number in (HUGE, 2**63):
        file.write_bytes(struct.pack("<Q", number) + b"{}")
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_file(file)


class Harm:
    """Pickled code."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "vision_tower/pytorch_model.bin"])
def test_pickled_code_does_not_run(tmp_path, name):
    theirs = llava(convnext_tower())
    folder = write_folder(tmp_path / "llava", theirs.state() if "tower" in name else {}, theirs.config())
    (folder / "vision_tower").mkdir()
    torch.save({"model.mm_projector.0.weight": Harm(tmp_path / "harm")}, folder / name)
    for read in (lambda: main([str(folder), str(tmp_path / "out")]), lambda: open_weights(str(folder))):
        with pytest.raises(ValueError, match="holds more than tensors"):
            read()
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_a_plain_pickle_is_no_archive(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": Harm(tmp_path / "harm")}))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_file(tmp_path / "a.bin")
    assert not (tmp_path / "harm").exists()


class Claims:
    """Pickles as a call of one of torch's functions that rebuild tensors."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(1).expand(HUGE), "claims"),
        (torch.empty(HUGE, device="meta"), "plain tensor"),
        (torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (HUGE,)), "plain tensor"),
        ("text", "expected a tensor, found a str"),
        (collections.OrderedDict(), "expected a tensor, found a OrderedDict"),
    ],
)
def test_tensors_that_claim_more_than_the_file_holds(tmp_path, value, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"encoder.stages": value}, tmp_path / "a.bin")
        with pytest.raises(ValueError, match=said):
            read_file(tmp_path / "a.bin")


def test_a_storage_that_claims_more_than_the_file_holds(tmp_path):
    torch.save({"a": torch.zeros(7)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    told = {name: own.replace(b"K\x07", b"\x8a\x06" + HUGE.to_bytes(6, "little")) for name, own in members.items()}
    assert told != members
    rewritten(tmp_path / "a.bin", told)
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_file(tmp_path / "a.bin")


def rewritten(file: Path, members: dict[str, bytes], **options) -> None:
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, own in members.items():
            archive.writestr(name, own)


def test_memory_that_only_a_pickle_asks_for(tmp_path):
    torch.save({"a": Claims(bytearray, HUGE)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_file(tmp_path / "a.bin")


def test_archives_of_another_form(tmp_path):
    torch.save({"a": torch.zeros(7)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    rewritten(tmp_path / "bomb.bin", members | {"good/data/1": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED)
    rewritten(tmp_path / "leaves.bin", members | {"../leaves": b""})
    rewritten(tmp_path / "root.bin", members | {"/leaves": b""})
    with zipfile.ZipFile(tmp_path / "twice.bin", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, own in [*members.items(), *members.items()]:
            archive.writestr(name, own)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.bin")
    for name, said in {
        "script": "TorchScript",
        "bomb": "compressed",
        "leaves": "leaves",
        "root": "leaves",
        "twice": "two members",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.bin is not a checkpoint: .*{said}"):
            read_file(tmp_path / f"{name}.bin")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"index\.json"):
        read_folder(tmp_path / "model")


def test_an_index_with_a_missing_shard_or_nonsense(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    for text, said in {
        '{"weight_map": {"a": "b.bin"}}': "b.bin, which is not there",
        '{"weight_map": {"a": 3}}': "expected names",
        '{"weight_map": 3}': "expected names",
        "[]": "expected a JSON object",
        '{"weight_map": {}, "weight_map": {}}': "duplicate key",
        "{": "index.json",
    }.items():
        index.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_folder(tmp_path)


def test_one_name_in_two_shards(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.full((1,), float(number))}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-2.safetensors: a is in another file"):
        read_folder(tmp_path)


def test_two_towers(tmp_path):
    theirs = llava(clip_tower())
    state = theirs.state("model.vision_tower.vision_tower.")
    state |= {f"vision_tower.{name}": tensor for name, tensor in theirs.tower.state_dict().items()}
    with pytest.raises(ValueError, match=r"two vision towers: model.vision_tower.vision_tower.… and vision_tower.…"):
        open_source(write_folder(tmp_path / "a", state, theirs.config()), "x")


def test_what_no_layout_explains_is_named(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/tf_model.h5").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"tf_model.h5(.|\n)*expected a file or folder of(.|\n)*ConvLLaVA(.|\n)*timm"
    ):
        main([str(tmp_path / "weights"), str(tmp_path / "out")])
    theirs = llava(clip_tower(heads=1))
    state = theirs.state("model.vision_tower.vision_tower.") | {"model.image_newline": torch.zeros(3)}
    told = theirs.config(mm_vision_tower="clip-vit-base-patch16")
    with pytest.raises(ValueError, match=r"1 unknown weights: llm.model.image_newline"):
        main([str(write_folder(tmp_path / "next", state, told)), str(tmp_path / "out")])
    for name, value in {
        "mm_projector_type": "linear",
        "mm_patch_merge_type": "spatial_unpad",
        "quantization_config": {},
    }.items():
        (tmp_path / "next/config.json").write_text(json.dumps(told | {name: value}))
        with pytest.raises(ValueError, match=rf"next/config.json: {name} is .*, expected"):
            main([str(tmp_path / "next"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_missing_weights_and_other_shapes_are_named(tmp_path):
    theirs = llava(clip_tower(heads=1))
    state, told = (
        theirs.state("model.vision_tower.vision_tower."),
        theirs.config(mm_vision_tower="clip-vit-base-patch16"),
    )
    lacking = {name: own for name, own in state.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(ValueError, match=r"1 missing weights: llm.model.layers.1.mlp.up_proj.weight"):
        main([str(write_folder(tmp_path / "a", lacking, told)), str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"lm_head.weight is \[3, 32\], .*expected \[640, 32\]"):
        main(
            [
                str(write_folder(tmp_path / "b", state | {"lm_head.weight": torch.zeros(3, 32)}, told)),
                str(tmp_path / "out"),
            ]
        )


def test_code_of_a_folder_does_not_run(tmp_path):
    """A config that asks for remote code is read without it."""
    theirs = llava(clip_tower(heads=1))
    told = theirs.config(mm_vision_tower="clip-vit-base-patch16", auto_map={"AutoConfig": "evil.Evil"})
    folder = write_folder(tmp_path / "a", theirs.state("model.vision_tower.vision_tower."), told)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    file = folder / "tokenizer_config.json"
    asks = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | asks))
    main([str(folder), str(tmp_path / "out")])
    told["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="model_type 'evil' is not in transformers; code of others is not run"):
        main([str(folder), str(tmp_path / "out_2")])
    assert not (tmp_path / "harm").exists()


def test_a_config_that_makes_no_sense(tmp_path):
    theirs = llava(clip_tower(heads=1))
    told = theirs.config(mm_vision_tower="clip-vit-base-patch16")
    folder = write_folder(tmp_path / "a", theirs.state("model.vision_tower.vision_tower."), told)
    wrong = {"head_dim": -1, "hidden_size": "x", "num_hidden_layers": HUGE, "mm_vision_select_layer": 9}
    wrong |= {"vocab_size": HUGE, "matryoshka_vis_token_scale": 5, "rope_parameters": 3}
    for name, value in wrong.items():
        (folder / "config.json").write_text(json.dumps(told | {name: value}))
        with pytest.raises(ValueError, match=r"a/config.json|embed_tokens|the vision feature layer is 8"):
            main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def shards(tmp_path):
    """A sharded checkpoint as torch writes it, and a function that writes its `.metadata` again."""
    folder = tmp_path / "last.ckpt"
    dcp.save({"state_dict": {"vlm.a": torch.ones(4, 2), "vlm.b": torch.zeros(3)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"trained": {}}, folder / "meta.pt")
    told = dcp.FileSystemReader(folder).read_metadata()
    return folder, told, lambda told: (folder / ".metadata").write_bytes(pickle.dumps(told))


def test_pickled_code_in_the_metadata_of_shards_does_not_run(tmp_path, shards):
    folder, told, write = shards
    for place in ("planner_data", "storage_meta", "state_dict_metadata"):
        setattr(told, place, {"a": Harm(tmp_path / "harm")})
        write(told)
        for read in (lambda: open_weights(str(folder)), lambda: is_of_fsdp1(folder)):
            with pytest.raises(ValueError, match=r"\.metadata is not .*names _?io\.open: pickled code is not run"):
                read()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b"])
def test_shards_cannot_leave_their_folder(tmp_path, shards, name):
    folder, told, write = shards
    for info in told.storage_data.values():
        shutil.copyfile(folder / info.relative_path, tmp_path / "secret")
        info.relative_path = name
    write(told)
    with pytest.raises(ValueError, match=r"\.metadata is not .*expected a file of this folder"):
        open_weights(str(folder))


def of(told, name):
    """What `.metadata` says of a tensor, and of where its only chunk is stored."""
    [info] = [info for index, info in told.storage_data.items() if index.fqn == name]
    return told.state_dict_metadata[name], info


def larger(told, name):
    tensor, _ = of(told, name)
    tensor.size = tensor.chunks[0].sizes = torch.Size([HUGE, 2])


def larger_than_its_chunks(told, name):
    of(told, name)[0].size = torch.Size([HUGE, 2])


def the_same_chunk_often(told, name):
    tensor, _ = of(told, name)
    tensor.chunks, tensor.size = tensor.chunks * 1000, torch.Size([4000, 2])


def outside(told, name):
    of(told, name)[0].chunks[0].sizes = torch.Size([2, 4])


def negative(told, name):
    tensor, _ = of(told, name)
    tensor.size = tensor.chunks[0].sizes = torch.Size([-4, -2])


def beyond_the_file(told, name):
    of(told, name)[1].length = HUGE


def before_the_file(told, name):
    of(told, name)[1].offset = -1


def the_same_bytes_twice(told, name):
    whole = sum(info.length for info in told.storage_data.values())
    for info in told.storage_data.values():
        info.offset, info.length = 0, whole


def transformed(told, name):
    of(told, name)[1].transform_descriptors = ["stream.zstd"]


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (larger, "claims .*the file holds"),
        (larger_than_its_chunks, "its 1 chunks have 8 elements"),
        (the_same_chunk_often, "its 1000 chunks"),
        (outside, "outside of"),
        (negative, "expected whole numbers"),
        (beyond_the_file, "it claims .* bytes of __0_0.distcp, which has"),
        (before_the_file, "expected whole numbers"),
        (the_same_bytes_twice, "it claims .* bytes of __0_0.distcp, which has"),
        (transformed, "expected plain tensors"),
    ],
)
def test_shards_that_claim_more_than_the_files_hold(shards, lie, said):
    folder, told, write = shards
    lie(told, "state_dict.vlm.a")
    write(told)
    with pytest.raises(ValueError, match=rf"\.metadata is not that of a sharded checkpoint: .*{said}"):
        open_weights(str(folder))


def test_metadata_of_shards_that_makes_no_sense(shards):
    folder, told, _ = shards
    whole = (folder / ".metadata").read_bytes()
    for own in (b"", whole[:-20], pickle.dumps({}), pickle.dumps(3), pickle.dumps([told.storage_meta])):
        (folder / ".metadata").write_bytes(own)
        with pytest.raises(ValueError, match=r"\.metadata is not that of a sharded checkpoint"):
            open_weights(str(folder))


def test_metadata_of_shards_that_would_fill_the_memory(shards):
    folder, told, write = shards
    deep = [1]
    for _ in range(24):  # 2**24 numbers once written out
        deep = [deep, deep]
    of(told, "state_dict.vlm.a")[1].offset = deep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(told)
    with pytest.raises(ValueError, match="expected whole numbers"):
        open_weights(str(folder))
    (folder / ".metadata").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b".")  # a bytearray of 1 GiB
    with pytest.raises(ValueError, match=r"\.metadata is not that of a sharded checkpoint"):
        open_weights(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_names_in_the_metadata_of_shards_that_are_no_texts(shards):
    folder, told, write = shards
    told.state_dict_metadata = {3: of(told, "state_dict.vlm.a")[0]}
    write(told)
    with pytest.raises(ValueError, match="a name in it is of type int, expected text"):
        open_weights(str(folder))


def test_chunks_are_checked_like_other_archives(tmp_path, shards):
    folder, told, write = shards
    for own in (Harm(tmp_path / "harm"), "x", torch.ones(2, 4), torch.ones(4, 2).half()):
        torch.save(own, folder / "chunk")
        _, info = of(told, "state_dict.vlm.a")
        info.relative_path, info.offset, info.length = "chunk", 0, (folder / "chunk").stat().st_size
        write(told)
        weights = open_weights(str(folder)).tensors
        with pytest.raises(ValueError, match=r"a in .*chunk holds more than tensors|chunk: .*a.*expected"):
            weights["a"]()
        assert torch.equal(weights["b"](), torch.zeros(3))
    assert not (tmp_path / "harm").exists()


def test_what_lies_beside_shards_is_checked_like_other_archives(tmp_path, shards):
    folder, _, _ = shards
    assert torch.equal(open_weights(str(folder)).tensors["a"](), torch.ones(4, 2))
    torch.save({"trained": Harm(tmp_path / "harm")}, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"meta\.pt holds more than tensors"):
        open_weights(str(folder))
    torch.save({"trained": {}, "a": torch.zeros(7)}, folder / "meta.pt")
    with zipfile.ZipFile(folder / "meta.pt") as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    rewritten(folder / "meta.pt", members | {"meta/data/9": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"meta\.pt is not a checkpoint: .*compressed"):
        open_weights(str(folder))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("key", ["checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained", "pretrained_strict"])
def test_keywords_of_timm_that_read_elsewhere(tmp_path, key):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "a"
    folder.mkdir()
    tower = TimmEncoder("vit_tiny_patch16_224", overrides={"img_size": 32})
    save_file(tower.trunk.state_dict(), folder / "model.safetensors")
    told = {"architecture": "vit_tiny_patch16_224", "model_args": {key: str(tmp_path / "secret.safetensors")}}
    (folder / "config.json").write_text(json.dumps(told))
    refused = pytest.raises(ValueError, match=f"encoder.overrides: {key} names files")
    with refused:
        encoder_config(open_source(folder, "x"))
    with refused:
        arguments = {"backbone": "a", "overrides": told["model_args"]}
        build_encoder(LitMMVisionConfig(encoder="TimmEncoder", arguments=arguments))


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "local-dir:/etc", "owner/name", "../x", ["a"]])
def test_names_of_backbones_that_read_elsewhere(name):
    with pytest.raises(ValueError, match=r"encoder.backbone .*: expected a name of timm's own models"):
        build_encoder(LitMMVisionConfig(encoder="TimmEncoder", arguments={"backbone": name}))


def test_weights_of_timm_that_only_a_config_asks_for(tmp_path):
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "secret.bin")}}
    told = {"backbone": "vit_tiny_patch16_224", "overrides": overlay}
    with pytest.raises(ValueError, match=r"vision_config.arguments: pretrained would read"):
        build_encoder(LitMMVisionConfig(encoder="TimmEncoder", arguments=told | {"pretrained": True}))
    build_encoder(LitMMVisionConfig(encoder="TimmEncoder", arguments=told))  # the file is not even looked for
