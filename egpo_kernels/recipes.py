"""Published methods as presets, under the name that users import: all of `egpo_kernels.config.recipes`."""

from egpo_kernels.config.recipes import *  # noqa: F403
