"""`omnimerge compose`: what is written, that nothing is lost, and what is refused."""

import json
import os
import shutil

import hostile
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import omnimerge
from omnimerge.cli import main
from omnimerge.compose import load_recipe
from omnimerge.compose.videos import FrameProcessor
from omnimerge.errors import CheckpointError, InputChangedError, NotMergeableError, RecipeError


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_towers_are_the_originals_and_the_llm_is_the_merge(omni, part):
    folder, plan = omni
    written, llava, base = tensors(folder), tensors(part("llava")), tensors(part("plain"))
    audio, video = tensors(part("qwen2_audio")), tensors(part("video_llava"))
    for name, disk in plan.parts["image"].tensors.items():
        assert torch.equal(written[disk], llava[name])
    name = "layers.1.self_attn.q_proj.weight"
    tau = sum(
        each[f"language_model.model.{name}"] - base[f"model.{name}"]
        for each in (llava, audio, video)
    )
    expected = base[f"model.{name}"] + 0.3 * tau
    torch.testing.assert_close(written[f"model.language_model.{name}"], expected)


def test_rows_of_new_tokens_are_those_of_the_model_that_brings_them(omni, part):
    folder, plan = omni
    written, base = tensors(folder), tensors(part("plain"))
    ours = "model.language_model.embed_tokens.weight"
    brought = {each.id: each for p in plan.parts.values() for each in p.brought}
    assert {each.name for each in brought.values()} == {
        "<image>", "<video>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
    }  # fmt: skip
    for ours, theirs, own in (
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head.weight", "lm_head"),
    ):
        for row in range(base[theirs].shape[0]):
            if row not in brought:
                assert torch.equal(written[ours][row], base[theirs][row])
                continue
            each = brought[row]
            source = tensors(plan.parts[each.part].checkpoint.folder)
            key = next(k for k in source if f"{own}.weight" in k)
            assert torch.equal(written[ours][row], source[key][each.native])


def test_every_tensor_of_every_model_is_accounted_for(omni, part):
    folder, _ = omni
    manifest = json.loads((folder / "merge_manifest.json").read_text())
    written = manifest["tensors"]
    assert set(written) == set(tensors(folder))
    for number, name in enumerate(("llava", "qwen2_audio", "video_llava")):
        model = part(name)
        parts = {k for k, v in manifest["composed"].items() if v["model"] == str(model)}
        of_part = {e["from"] for e in written.values() if e.get("part") in parts}
        merged = {s for e in written.values() if "sources" in e for s in e["sources"][number]}
        unused = set(manifest["unused"][str(model)])
        assert of_part | merged | unused == set(tensors(model))
        assert not merged & unused
        assert not of_part & (merged | unused)
    assert manifest["recipe"]["models"][2]["provides"] == ["video"]
    assert "| audio | " in (folder / "README.md").read_text()


def run(*arguments):
    return CliRunner().invoke(main, ["compose", *map(str, arguments)])


def recipe_file(folder, models, **more):
    file = folder / "recipe.yaml"
    described = {"method": "linear", "models": models, **more}
    file.write_text(json.dumps(described, default=str))  # JSON is YAML
    return file


def test_command_prints_what_went_where(part, tmp_path):
    models = [{"model": part("llava")}, {"model": part("qwen2_audio")}]
    file = recipe_file(tmp_path, models, base=part("plain"))
    result = run(
        file, "-o", tmp_path / "out", "--method", "task_arithmetic", "--param", "scale=0.5"
    )
    assert result.exit_code == 0, result.output
    assert "task_arithmetic (scale 0.5) -> " in result.output
    assert "language model: merged 19 tensors, kept 2 of the target's" in result.output
    assert "<|AUDIO|>" in result.output
    result = run(file, "-o", tmp_path / "out", "--overwrite", "--json")
    found = json.loads(result.output)
    assert found["parts"]["audio"]["tensors"] == 24
    assert found["language_model"]["merged"] == 19


def test_what_does_not_fit_is_refused_in_one_line(part, tmp_path):
    llava, audio, video = part("llava"), part("qwen2_audio"), part("video_llava")
    cases = [
        ([llava, part("llava", hidden_size=64)], "hidden"),
        ([llava, part("qwen2_audio", "llama", own="x", num_hidden_layers=3)], "layers"),
        ([llava, video], "provides image already"),
        ([llava, part("plain")], "(llama) offers no image, audio or video features"),
        ([llava, {"model": audio, "provides": "video"}], "offers audio, and not video"),
        ([{"model": llava, "provides": "text"}, {"model": audio, "provides": "text"}],
         "no model provides a modality"),
    ]  # fmt: skip
    for models, message in cases:
        listed = [each if isinstance(each, dict) else {"model": each} for each in models]
        result = run(recipe_file(tmp_path, listed), "-o", tmp_path / "out")
        assert result.exit_code == 1, message
        assert message in result.output, result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()


def test_another_llm_of_the_same_size_is_refused(part, tmp_path):
    foreign = part("qwen2_audio", own="foreign")
    written = load_file(foreign / "model.safetensors")
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(9)
    other = tmp_path / "other"
    other.mkdir()
    for file in foreign.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    scrambled = {
        name: torch.randn(t.shape, generator=random) if "language_model" in name else t
        for name, t in written.items()
    }
    save_file(scrambled, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotMergeableError, match="share no ancestor"):
        omnimerge.compose({"method": "linear", "models": [part("llava"), other]}, tmp_path / "out")


def test_a_missing_tower_is_named(part, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in part("llava").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    kept = {k: v for k, v in load_file(broken / "model.safetensors").items()
            if "vision_tower" not in k}  # fmt: skip
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": broken}, {"model": part("qwen2_audio")}]
    result = run(recipe_file(tmp_path, models), "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "lacks 39 tensors of its architecture: vision_tower." in result.output


def changed(folder, source, edit):
    """A copy of a checkpoint with other weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TOWER, ROWS = "vision_tower", "embed_tokens"


@pytest.mark.parametrize("leaf", [TOWER, ROWS])
def test_towers_and_rows_that_hold_nan_are_refused(part, tmp_path, leaf):
    def edit(held):
        row = 260 if leaf == ROWS else 0  # of <image>
        next(v for k, v in held.items() if leaf in k and v.ndim == 2)[row, 0] = float("nan")

    broken = changed(tmp_path / "nan", part("llava"), edit)
    audio = part("qwen2_audio")
    file = recipe_file(tmp_path, [broken, audio], target=audio)
    result = run(file, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "holds NaN; repair the checkpoint" in result.output
    assert not (tmp_path / "out").exists()
    assert run(file, "-o", tmp_path / "out", "--force", "finite").exit_code == 0
    assert any(torch.isnan(tensor).any() for tensor in tensors(tmp_path / "out").values())


def test_rows_that_hold_infinity_are_copied_and_pass(part, tmp_path):
    """Also where the embedding is merged but for them."""

    def edit(held):
        next(v for k, v in held.items() if ROWS in k)[260, 0] = float("inf")  # of <image>

    masked = changed(tmp_path / "masked", part("llava"), edit)
    audio = part("qwen2_audio")
    file = recipe_file(tmp_path, [masked, audio], target=audio, vocabulary="overlap")
    assert run(file, "-o", tmp_path / "out").exit_code == 0
    entry = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["tensors"]
    embed = "model.language_model.embed_tokens.weight"
    assert "sources" in entry[embed] and tensors(tmp_path / "out")[embed].isinf().sum() == 1
    assert {state for state, _ in found(tmp_path / "out", deep=True).values()} == {"ok"}


@pytest.mark.parametrize("leaf", [TOWER, ROWS])
def test_towers_and_rows_that_overflow_are_refused(part, tmp_path, leaf):
    def edit(held):
        row = 260 if leaf == ROWS else 0
        next(v for k, v in held.items() if leaf in k and v.ndim == 2)[row, 0] = 1e6

    big = changed(tmp_path / "big", part("llava"), edit)
    audio = part("qwen2_audio")
    models, into = [big, audio], {"target": audio}
    file = recipe_file(tmp_path, models, dtype="float16", **into)
    result = run(file, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "overflows float16; set dtype: bfloat16" in result.output
    assert not (tmp_path / "out").exists()
    file = recipe_file(tmp_path, models, dtype="bfloat16", **into)
    assert run(file, "-o", tmp_path / "out").exit_code == 0


def test_wrong_recipes_are_refused_before_anything_is_opened():
    with pytest.raises(RecipeError) as error:
        load_recipe({"method": "linear", "select": "all",
                     "models": [{"model": "a", "provides": "vidio"}, {"model": "b"}]})  # fmt: skip
    assert "models.0.provides: 'vidio' is none of image, audio, video, text" in str(error.value)
    assert "select: all would merge towers" in str(error.value)
    for odd in ([["image"]], [3], {"a": 1}, []):
        models = [{"model": "a", "provides": odd}, {"model": "b"}]
        with pytest.raises(RecipeError, match=r"models\.0\.provides: .*image, audio, video, text"):
            load_recipe({"method": "linear", "models": models})
    with pytest.raises(RecipeError, match="modles: unknown key"):
        load_recipe({"method": "linear", "modles": [], "models": ["a", "b"]})


def test_lora_experts_of_one_llm(part, tmp_path):
    """ModelCompose: towers of each model, and a LoRA on the common LLM that makes the expert."""

    rank, name = 2, "language_model.model.layers.0.mlp.up_proj"
    random = torch.Generator().manual_seed(4)
    from safetensors.torch import save_file

    lora = {
        "A": torch.randn(rank, 32, generator=random),
        "B": torch.randn(64, rank, generator=random),
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}.lora_{k}.weight": v * 0.1 for k, v in lora.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    models = [
        {"model": part("llava"), "adapter": folder, "provides": "image"},
        {"model": part("qwen2_audio")},
    ]
    recipe = {"method": "task_arithmetic", "base": part("plain"), "models": models,
              "parameters": {"scale": 1.0}}  # fmt: skip
    omnimerge.compose(recipe, tmp_path / "out")
    llava, audio, base = (tensors(part(n)) for n in ("llava", "qwen2_audio", "plain"))
    expert = llava[f"{name}.weight"] + 2.0 * 0.01 * lora["B"] @ lora["A"]
    own = base["model.layers.0.mlp.up_proj.weight"]
    found = tensors(tmp_path / "out")["model.language_model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, expert + audio[f"{name}.weight"] - own)


def test_a_token_that_two_parts_bring_gets_a_second_name(part, tmp_path):
    folder = part("qwen2_vl")
    models = [{"model": folder, "provides": kind} for kind in ("image", "video")]
    plan = omnimerge.compose({"method": "linear", "models": models}, tmp_path / "out")
    image, video = ({e.token: e for e in plan.parts[k].brought} for k in ("image", "video"))
    assert image["<|vision_start|>"].name == "<|vision_start|>"
    assert video["<|vision_start|>"].name == "<|video:vision_start|>"
    ids = [each.id for each in (*image.values(), *video.values())]
    assert len(set(ids)) == len(ids)
    snippet = "<|video:vision_start|><|video_pad|><|video:vision_end|>"
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}
    assert snippet in plan.processor.apply_chat_template([turn], tokenize=False)


def test_the_generator_answers_about_files(omni, tmp_path, media):
    from omnimerge.generate.generator import Generator
    from omnimerge.generate.prompts import Prompt

    media.image().save(tmp_path / "a.png")
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(media.video(3)):
        frame.save(tmp_path / "clip" / f"{number}.png")
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((media.sound() * 32767).astype(np.int16).tobytes())
    both = {"images": (tmp_path / "a.png",), "audios": (tmp_path / "a.wav",)}
    prompts = [
        Prompt(id="a", prompt="what?", **both),
        Prompt(id="b", prompt="what?", videos=(tmp_path / "clip",), **both),
        Prompt(id="c", prompt="what?"),
    ]
    generator = Generator.load(omni[0])
    answers = generator.responses(prompts, max_new_tokens=4)
    assert [len(answer.tokens) for answer in answers] == [4, 4, 4]
    alone = [generator.responses([prompt], max_new_tokens=4)[0].tokens for prompt in prompts]
    assert [answer.tokens for answer in answers] == alone
    assert len(set(alone)) > 1


def test_composed_checkpoints_can_be_inspected(omni):
    found = omnimerge.inspect(omni[0])
    assert found["model_type"] == "omnimerge_omni"


def test_frames_fill_the_time_slots_of_a_patch(part):
    frames = FrameProcessor.load(part("qwen2_vl"))
    pictures = [Image.new("RGB", (28, 28), (value,) * 3) for value in (0, 100, 200)]
    made = frames([pictures])
    assert made["video_grid_thw"].tolist() == [[2, 2, 2]]  # the last frame fills up the second
    pixels = made["pixel_values_videos"].reshape(2, 4, 3, 2, 14, 14)
    red = pixels[:, :, 0].mean(dim=(1, 3, 4))
    mean, spread = 0.48145466, 0.26862954
    expected = (torch.tensor([[0, 100], [200, 200]]) / 255 - mean) / spread
    torch.testing.assert_close(red, expected, atol=1e-5, rtol=0)


def test_a_method_that_merges_into_a_target_takes_its_tower_too(part, tmp_path):
    recipe = {"method": "adamms", "target": part("llava"), "models": [part("qwen2_audio")],
              "parameters": {"alpha": 0.25}}  # fmt: skip
    plan = omnimerge.compose(recipe, tmp_path / "out")
    assert list(plan.parts) == ["image", "audio"]
    name = "layers.0.self_attn.v_proj.weight"
    found = tensors(tmp_path / "out")[f"model.language_model.{name}"]
    llava, audio = tensors(part("llava")), tensors(part("qwen2_audio"))
    disk = f"language_model.model.{name}"
    torch.testing.assert_close(found, 0.75 * llava[disk] + 0.25 * audio[disk])


def test_a_model_that_provides_text_is_merged_and_gives_no_part(part, tmp_path):
    other = part("plain", own="maths")
    models = [{"model": part("llava")}, {"model": other, "provides": "text"}]
    recipe = {"method": "linear", "models": models, "dtype": "bfloat16", "max_shard_size": "100KB"}
    plan = omnimerge.compose(recipe, tmp_path / "out")
    assert list(plan.parts) == ["image"]
    written = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    name = "layers.0.self_attn.v_proj.weight"
    both = tensors(part("llava"))[f"language_model.model.{name}"] + tensors(other)[f"model.{name}"]
    found = written[f"model.language_model.{name}"]
    torch.testing.assert_close(found, (both / 2).bfloat16(), atol=0, rtol=0)


def test_models_at_urls(part, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIMERGE_CACHE", str(tmp_path / "cache"))
    models = [part("llava"), part("qwen2_audio")]
    omnimerge.compose({"method": "linear", "models": models}, tmp_path / "near")
    recipe = {"method": "linear", "models": [model.as_uri() for model in models]}
    omnimerge.compose(recipe, tmp_path / "far")
    near, far = tensors(tmp_path / "near"), tensors(tmp_path / "far")
    assert near.keys() == far.keys()
    assert all(torch.equal(near[name], far[name]) for name in near)


# --- verify ----------------------------------------------------------------------------------


def found(folder, **options):
    return {
        check.name: (check.state, check.details) for check in omnimerge.verify(folder, **options)
    }


def test_verify_passes(omni):
    states = {name: state for name, (state, _) in found(omni[0], deep=True).items()}
    assert states == dict.fromkeys(
        [
            "checksums of the files",
            "names, shapes and dtypes",
            "finite numbers",
            "unmerged tensors are the target's",
            "towers and projectors are their models'",
            "20 merged tensors computed again",
        ],
        "ok",
    )
    described = json.loads((omni[0] / "merge_manifest.json").read_text())
    written = {p.relative_to(omni[0]).as_posix() for p in omni[0].rglob("*") if p.is_file()}
    assert described["files"].keys() == written - {"README.md", "merge_manifest.json"}


def test_verify_passes_with_another_dtype_and_shards(part, tmp_path):
    models = [{"model": part("llava")}, {"model": part("qwen2_audio")}]
    recipe = {"method": "linear", "models": models, "dtype": "bfloat16", "max_shard_size": "60KB"}
    omnimerge.compose(recipe, tmp_path / "out")
    checks = found(tmp_path / "out", deep=True)
    assert {state for state, _ in checks.values()} == {"ok"} and len(checks) == 6
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_verify_finds_what_was_changed(omni, tmp_path):
    from safetensors.torch import save_file

    folder, plan = omni
    shutil.copytree(folder, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    tower = next(iter(plan.parts["image"].tensors.values()))
    weights[tower].view(-1)[0] += 1
    weights["lm_head.weight"][3, 0] += 1  # the target's row
    norm = "model.language_model.norm.weight"
    weights[norm][0] = float("nan")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "modeling_x.py").write_text("")
    checks = found(tmp_path / "out", deep=True, tensors=1000)
    failed = {name: details for name, (state, details) in checks.items() if state == "failed"}
    assert failed == {
        "checksums of the files": (
            "modeling_x.py was added: the manifest does not name it",
            "model.safetensors is not what was written",
        ),
        "finite numbers": (f"tensor {norm!r} holds NaN or infinity",),
        "unmerged tensors are the target's": ("tensor 'lm_head.weight' is not the target's",),
        "towers and projectors are their models'": (
            f"tensor {tower!r} is not that of {plan.parts['image'].checkpoint.reference}",
        ),
        "1000 merged tensors computed again": (
            f"tensor {norm!r} is not what the recipe gives (elements 0:32)",
        ),
    }


def test_verify_knows_the_rows_that_are_the_targets(omni, tmp_path, monkeypatch):
    """Also where a part brought rows behind the target's, as most do."""
    from omnimerge.engine._verify_folder import WrittenFolder
    from omnimerge.engine._verify_inputs import MergedAgain

    again = MergedAgain(WrittenFolder(omni[0], json.loads(
        (omni[0] / "merge_manifest.json").read_text())))  # fmt: skip
    (job,) = [job for job in omni[1].merge.jobs if job.slot == "llm.head.weight"]
    rows, width = job.output.shape
    for brought, expected in (
        ([], [(0, rows)]),
        ([rows + 5], [(0, rows)]),
        ([0, 2, 3, rows + 1], [(1, 2), (4, rows)]),
        ([rows - 1, 7], [(0, 7), (8, rows - 1)]),
    ):
        monkeypatch.setattr(again, "_brought", lambda brought=brought: iter(brought))
        ranges = [(a // width, b // width) for a, b in again._ranges_of_target(job)]
        assert ranges == expected


def test_verify_without_the_inputs(omni, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(omni[0], out)
    described = json.loads((out / "merge_manifest.json").read_text())
    described["recipe"]["base"] = "in/base"
    (out / "merge_manifest.json").write_text(json.dumps(described))
    states = [state for state, _ in found(out, deep=True).values()]
    assert states == ["ok"] * 3 + ["skipped"] * 3


def test_verify_with_an_older_manifest(omni, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(omni[0], out)
    described = json.loads((out / "merge_manifest.json").read_text())
    del described["files"]
    for entry in described["tensors"].values():
        del entry["stored"]
    for part in described["composed"].values():
        del part["input"]
    (out / "merge_manifest.json").write_text(json.dumps(described))
    states = [state for state, _ in found(out).values()]
    assert states == ["skipped", "skipped", "ok", "ok", "skipped"]


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("tokenizer.json", "link", "is a link that leaves its folder"),
        ("generation_config.json", "link", "is a link that leaves its folder"),
        ("notes.txt", "link", "is a link that leaves its folder"),
        ("chat_template.jinja", "pipe", "is no regular file"),
        ("preprocessor_config.json", "large", "more than 500,000,000 bytes"),
        ("processor_config.json", "folder", "Is a directory"),
        ("additional_chat_templates/x.jinja", "pipe", "is no regular file"),
    ],
)
@pytest.mark.parametrize("role", ["base", "model"])
def test_small_files_that_are_none(part, tmp_path, role, name, how, words):
    """What transformers would read is looked at before it does, in every folder."""
    folder = tmp_path / "copy"
    shutil.copytree(part("plain" if role == "base" else "llava"), folder)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if how == "link":
        (tmp_path / "outside").write_text("{}")
        file.symlink_to(tmp_path / "outside")
    elif how == "large":
        with file.open("wb") as stream:
            stream.truncate(500_000_001)
    else:
        os.mkfifo(file) if how == "pipe" else file.mkdir()
    places = {"base": part("plain"), "model": part("llava"), role: folder}
    recipe = {
        "method": "task_arithmetic", "base": str(places["base"]),
        "models": [str(places["model"])], "parameters": {"scale": 0.3},
    }  # fmt: skip
    with hostile.deadline(60), pytest.raises(CheckpointError, match=words):
        omnimerge.compose(recipe, tmp_path / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json"])
def test_a_source_that_changes_meanwhile(part, tmp_path, file):
    base = tmp_path / "base"
    shutil.copytree(part("plain"), base)
    recipe = {
        "method": "task_arithmetic", "base": str(base), "models": [str(part("llava"))],
        "parameters": {"scale": 0.3},
    }  # fmt: skip

    def change(*_):
        os.utime(base / file, (1, 1))

    with pytest.raises(InputChangedError, match=f"{file} changed while it was merged"):
        omnimerge.compose(recipe, tmp_path / "out", on_progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
