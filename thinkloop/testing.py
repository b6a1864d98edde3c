"""Models for your own tests: `ScriptedModel` plays turns that you write down, `ChaosModel` spoils another model's
calls."""

from thinkloop.agent.testing import ChaosModel, ScriptedModel

__all__ = ["ChaosModel", "ScriptedModel"]
