"""The model proxy: any agent that speaks to an LLM API is trained without a change, on exactly the tokens it was given.

See docs/proxy.md. `open_proxy` and `train_mode` are in `ale.proxy.server`, which needs the extra `proxy`.
"""
