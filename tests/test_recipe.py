"""The recipe: from names, overrides and dictionaries, and its refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace

import pytest

from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.recipe import Recipe, SideCodes

NAMES = ["million-paper", "million-paper-2bit", "pq-2bit", "pq-3bit", "pq-4bit"]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_recipe_is_the_one_that_hydra_composes(name: str) -> None:
    overrides = [
        "sample.tokens=77",
        "train.iterations=3",
        "quantizer.keys.nbits=6",
        "quantizer.values.nbits=6",
    ]
    assert Recipe.named(name) == compose([f"quantizer={name}"]).recipe
    assert Recipe.named(name, *overrides) == compose([f"quantizer={name}", *overrides]).recipe
    assert Recipe.named(name).quantizer.name == name


def test_the_files_spell_out_the_defaults() -> None:
    recipe = Recipe.named("pq-4bit")
    assert (recipe.sample, recipe.train) == (Recipe().sample, Recipe().train)
    for group in ("sample", "train"):
        text = (conf_folder() / group / "default.yaml").read_text()
        assert [line.split(":")[0] for line in text.splitlines()] == [
            field.name for field in fields(getattr(recipe, group))
        ]


def test_it_survives_json_and_pickle_and_is_a_key() -> None:
    recipe = Recipe.named("pq-3bit", "sample.context=128", "quantizer.widths=[2,4]")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert len({recipe, Recipe.from_dict(recipe.to_dict())}) == 1


def test_overriding_is_replacing() -> None:
    recipe = Recipe.named("pq-4bit")
    quantizer = replace(recipe.quantizer, bits=3.5, keys=replace(recipe.quantizer.keys, rotation="hadamard"))
    changed = recipe.override("quantizer.bits=3.5", "quantizer.keys.rotation=hadamard")
    assert changed == replace(recipe, quantizer=quantizer)
    assert recipe == Recipe.named("pq-4bit")


def test_no_name_is_in_two_of_its_parts() -> None:
    seen: list[str] = []
    parts: list[type] = [type(part) for part in vars(Recipe()).values()] + [SideCodes]
    for part in parts:
        assert is_dataclass(part)
        seen += [field.name for field in fields(part)]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantizer.scope=all", "quantizer.scope=all: accepted are merged, layer, head"),
        ("train.trainer=numpy", "train.trainer=numpy: accepted are torch, faiss"),
        ("train.encoder=numpy", "train.encoder=numpy: accepted are torch, keops, faiss"),
        ("quantizer.seeding=pca", r"quantizer.seeding=pca: accepted are kmeans\+\+, random"),
        ("quantizer.weighting=x", "quantizer.weighting=x: accepted are none, gradient"),
        ("quantizer.keys.rotation=haar", "rotation=haar: accepted are none, hadamard, opq"),
        ("quantizer.values.metric=l1", "metric=l1: accepted are euclidean, fisher"),
        ("train.iterations=0", "train.iterations=0: accepted are integers from 1"),
        ("train.iterations=many", "train.iterations: Value 'many'"),
        ("train.max_samples_per_centroid=0", "train.max_samples_per_centroid=0"),
        ("train.held_out=0.7", "train.held_out=0.7: accepted are shares from 0 to 0.5"),
        ("sample.code=0.95", "accepted are shares from 0, together below 1"),
        ("train.speed=9", "train.speed: Key 'speed' not in 'Training'"),
        ("quantizer.scope=merged", "quantizer.bits=4: layers of one codebook cannot differ"),
    ],
)
def test_refusals_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Recipe.named("pq-4bit", override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pq-5bit", "fp8", "dense", "../quantizer/pq-4bit"])
def test_a_name_without_a_codebook_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"recipe={name}: accepted are {', '.join(NAMES)}"):
        Recipe.named(name)


def test_recipes_need_no_torch() -> None:
    code = """if True:
        import sys
        from million_cli.recipe import Recipe
        Recipe.named("pq-4bit")
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
