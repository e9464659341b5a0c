"""Requests -> tokens: scheduler, paged KV cache, sampler, runner, engine, and the Python face `LanguageModel`."""
