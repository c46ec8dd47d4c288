# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv doctor`: whether the plugin works in this environment, and why not.

`command` starts a child process, because vLLM may be missing, raise, hang or end the process that
imports it. The child runs the functions in `checks` and sends findings and facts as messages.
`report` reads the messages, even if the child ended early, and makes the JSON and the text.
"""
