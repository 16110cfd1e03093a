"""Schemes: presets, contradictions, JSON."""

import json
from dataclasses import FrozenInstanceError

import pytest

import pydenoise as pdn
from pydenoise.quantization import PRESETS, Scheme, resolve_scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    scheme = resolve_scheme(name)
    assert scheme.granularity == name
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert str(scheme).startswith(name)


def test_is_reached_from_the_package():
    assert pdn.quantization.Scheme is Scheme


def test_auto_and_schemes_pass_through():
    assert resolve_scheme("auto") == "auto"
    scheme = Scheme("per_pixel", symmetric=True)
    assert resolve_scheme(scheme) is scheme


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Scheme().symmetric = True


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"granularity": "per_channel"}, ValueError, "granularity"),
        ({"clip": "mse"}, ValueError, "clip"),
        ({"weight_clip": "mse"}, ValueError, "weight_clip"),
        ({"symmetric": 1}, TypeError, "symmetric"),
        ({"bias_correction": None}, TypeError, "bias_correction"),
        ({"buckets": 0}, ValueError, "buckets"),
        ({"buckets": 2.0}, TypeError, "buckets"),
        ({"buckets": 3}, ValueError, "buckets"),
        ({"smooth": 1.5}, ValueError, "smooth"),
        ({"smooth": "0.5"}, TypeError, "smooth"),
        ({"granularity": "per_pixel", "clip": "search"}, ValueError, "clip"),
        ({"granularity": "float", "symmetric": True}, ValueError, "granularity"),
    ],
)
def test_bad_fields_are_named(fields, error, name):
    with pytest.raises(error, match=rf"^{name}:"):
        Scheme(**fields)


def test_unknown_names_and_fields():
    with pytest.raises(ValueError, match="^scheme:.*'auto', 'per_tensor'"):
        resolve_scheme("int8")
    with pytest.raises(TypeError, match="^scheme:"):
        resolve_scheme(8)
    with pytest.raises(ValueError, match="'bits'"):
        Scheme.from_dict({"bits": 4})


def test_dynamic_scales_follow_the_kind_of_layer():
    assert Scheme("per_pixel").for_kind("linear").granularity == "per_token"
    assert Scheme("per_token", symmetric=True).for_kind("conv2d") == Scheme("per_pixel", symmetric=True)
    assert Scheme("per_tensor").for_kind("linear") == Scheme("per_tensor")
    costs = [PRESETS[name].cost for name in ("per_tensor", "per_timestep", "per_pixel", "float")]
    assert costs == sorted(set(costs))
