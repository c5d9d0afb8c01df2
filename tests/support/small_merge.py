"""A merge of the tests' small pair: its recipe, the command, and what is in its output."""

from click.testing import CliRunner

from omnimerge.cli import main


def recipe_of(checkpoints, **more):
    """LLaVA-OneVision into Qwen2-VL by `adamms`."""
    return {
        "method": "adamms",
        "target": str(checkpoints("qwen2_vl")),
        "models": [str(checkpoints("llava_onevision"))],
        "parameters": {"alpha": 0.3},
        **more,
    }


def run(*arguments):
    """The command `omnimerge`."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def files(folder):
    """Path -> content of every file in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
