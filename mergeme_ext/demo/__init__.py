"""The demo: two quick experts of a small real model, every merge and MoE of them, one table."""

from mergeme_ext.demo.inputs import InputsMissing
from mergeme_ext.demo.pipeline import run_demo
from mergeme_ext.demo.settings import DemoSettings, default_cache

__all__ = ["DemoSettings", "InputsMissing", "default_cache", "run_demo"]
