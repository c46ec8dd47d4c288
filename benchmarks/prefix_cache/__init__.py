# SPDX-License-Identifier: Apache-2.0
"""Hit rates of prefix caches on hybrid models: traces, sizes of memory, models, cache dtypes."""
