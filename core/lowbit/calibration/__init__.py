"""Calibration: texts become tokens, tokens run through one decoder block at a time, and quantizers get what they asked for.

``run_blocks`` is all of it without the pipeline around it, for trying a quantizer::

    from lowbit.calibration.runner import run_blocks

    with registry.open(path) as checkpoint:
        choices = Recipe(Rule("*", "autoround", {"bits": "2"})).choose(checkpoint.entries, registry)
        for block in run_blocks(checkpoint, choices, tokens, registry, note=print):   # tokens int64 (samples, seqlen)
            block.quantized                                                           # tensor name -> QuantizedTensor

A quantizer whose ``needs_for(options)`` holds ``block_inputs`` gets a ``Block`` in ``quantize_block``; ``importance`` and
``hessian`` arrive in the ``Calibration`` of each weight. Two chains of activations run beside each other: the *float* chain
(targets, and all statistics, which therefore do not depend on bits or quantizer and can be kept) and the *quantized* chain
(what blocks receive in the model as it will be).

In a conversion ``Job`` does the same between planning and writing: every finished block goes into a ``WorkDirectory`` first, and the
pipeline takes its tensors from there, in the order of the plan.
"""
