# SPDX-License-Identifier: Apache-2.0
"""Prints the fingerprints of functions in the vLLM that this process imports.

Reads `[[module, name], …]` as JSON and prints one JSON line, the last of the output. The
fingerprints are taken as the plugin takes them.
"""

import json
import sys

from vllm_hybrid_kv.patches.base import Fingerprint, Target, underlying


def main() -> None:
    import vllm
    from vllm.version import __version__

    fingerprints = []
    for module, name in json.load(sys.stdin):
        try:
            found = Fingerprint.of(underlying(Target(module, name, Fingerprint("", "")).binding()))
        except Exception as error:
            fingerprints.append({"error": f"{type(error).__name__}: {error}"})
        else:
            fingerprints.append({"signature": found.signature, "source": found.source})
    print(json.dumps({"version": __version__, "file": vllm.__file__, "fingerprints": fingerprints}))


main()
