"""The variants of tests that CI runs; the others are marked `exhaustive`, and `slow`.

Compilation is most of the suite's time, and many tests repeat one check for several models, meshes,
cards or stores. CI has the variants that differ most; `pytest -m exhaustive` runs the others.
"""

_NORM = "kernels/timestep_norm"
_COLLECTIVES = "parallel/test_collectives.py"
_ARCHITECTURES = ("all, ema", "all, no average")

CI_VARIANTS: dict[str, tuple[str, ...]] = {
    "baselines/test_attention_compiled.py::test_cudnn_is_the_default_on_hopper": ("packed",),
    "baselines/test_attention_compiled.py::test_splash_attention_is_the_default_on_tpus": (
        "rows-v6e:1x1", "packed-v5p:1x1x1",
    ),
    "baselines/test_runs.py::test_plans_count_the_attention_of_the_target": ("v5e:1x1-splash",),
    "baselines/test_transformer.py::test_logits_and_every_gradient_equal_the_definition": (
        "full", "grouped, window, tied",
    ),
    "baselines/test_transformer.py::test_meshes_train_like_one_device": ("three axes",),
    "baselines/test_transformer.py::test_rematerialization_changes_nothing": (
        "{'remat': 'dots', 'scan_layers': False}",
    ),
    "baselines/test_transformer.py::test_streaming_equals_one_call": ("grouped, window, tied",),
    "bench/test_train.py::test_several_lengths_in_one_call": ("tokens",),
    "data/test_pieces.py::test_batches_do_not_depend_on_the_pieces": (
        "pack-byte_level", "pack-prepend", "pad-sentencepiece",
    ),
    "data/test_pieces.py::test_memory_does_not_depend_on_the_size_of_the_text": ("byte_level",),
    "encoder/test_encoder.py::test_meshes_equal_one_device": (
        "chunks-sizes2",
    ),
    "encoder/test_encoder.py::test_packed_documents_are_computed_alone": (
        "chunks", "full", "patches", "causal",
    ),
    "encoder/test_transformer_encoder.py::test_meshes_equal_one_device": ("sizes1",),
    "evaluation/test_answers.py::test_teacher_forcing_agrees_with_generation": ("megalodon",),
    "evaluation/test_context.py::test_perplexity_equals_whole_rows": ("megalodon", "window"),
    "evaluation/test_examples.py::test_a_round_of_self_improvement_reads_what_it_wrote": (
        "megalodon",
    ),
    "evaluation/test_streaming.py::test_streaming_equals_one_call": ("2",),
    "faults/test_signals.py::test_a_second_signal_during_compilation_leaves_at_once": ("2",),
    "faults/test_signals.py::test_a_signal_between_steps_and_the_end_of_the_resumed_run": ("15",),
    "faults/test_signals.py::test_a_signal_in_an_evaluation_during_training": ("2",),
    "faults/test_signals.py::test_a_signal_in_the_sample": ("15",),
    "inference/test_mesh.py::test_tokens_equal_those_of_one_device": (
        "{'data': 2, 'model': 2}-model", "{'data': 2, 'model': 2}-int8",
    ),
    "inference/test_speculation.py::test_blocks_equal_plain_blocks_whatever_the_drafts": (
        "0.25", "1.0",
    ),
    "inference/test_speculation.py::test_several_tokens_at_once_equal_as_many_steps": (
        "default", "all, ema",
    ),
    "inference/test_step.py::test_steps_equal_the_full_forward_pass": (
        "default", "tied, prior, no affine", *_ARCHITECTURES,
    ),
    "inference/test_step_compiled.py::test_a_block_copies_no_cache": ("2-2-model", "16-8-int8"),
    "interop/test_lm_eval.py::test_generation_is_the_greedy_one": ("megalodon-3", "transformer-3"),
    "interop_flax/test_qwix.py::test_kernels_may_hold_quantized_arrays": ("int8",),
    "interop_flax/test_qwix.py::test_lora_starts_at_the_base_and_learns_alone": ("True",),
    "interop_flax/test_qwix.py::test_quantized_activations": ("True",),
    "interop_flax/test_qwix.py::test_quantized_weights": ("True-int4", "False-int8"),
    "kernels/cema/test_bidirectional.py::test_equals_the_double_sum_with_gradients": (
        "False-xla", "True-reference", "True-xla",
    ),
    "kernels/cema/test_bidirectional.py::test_sequence_shards_equal_one_device": ("True",),
    "kernels/cema/test_gpu_context_parallel.py::test_shards_equal_the_recurrence": (
        "128-32-True-False-mosaic_gpu", "192-64-False-True-triton",
    ),
    "kernels/cema/test_pallas_tpu.py::test_documents_are_isolated": ("5",),
    "kernels/cema/test_pallas_tpu_aot.py::test_compiles": ("v4", "v6e"),
    "kernels/cema/test_triton_aot.py::test_kernels_fit_every_generation": (
        "80-True", "86-True", "120-True",
    ),
    "kernels/chunk_attention/test_mosaic_gpu.py::test_equals_float64": (
        "450-1-widths0-384-None", "300-2-widths2-130-documents2",
    ),
    "kernels/chunk_attention/test_pallas_tpu_aot.py::test_compiles": ("v5e", "v5p"),
    "kernels/chunk_attention/test_triton.py::test_values_in_several_blocks_equal_float64": (
        "float32-True-widths0-triton", "bfloat16-False-widths3-triton",
    ),
    "kernels/chunk_attention/test_triton_aot.py::test_kernels_fit_every_generation": (
        "widths1-86", "widths4-120", "widths5-120", "widths6-86",
    ),
    "kernels/chunk_decode/test_pallas_tpu.py::test_compiles_and_updates_the_cache_in_place": (
        "v5e-model-8-9", "v5p-int8-256-256", "v6e-model-256-256",
    ),
    "kernels/rowwise/test_triton_aot.py::test_kernels_fit_every_generation": (
        "norm-4096-80", "norm-4096-120", "gate-4096-86",
    ),
    f"{_NORM}/test_gpu_context_parallel.py::test_documents_do_not_affect_other_shards": (
        "mosaic_gpu",
    ),
    f"{_NORM}/test_gpu_context_parallel.py::test_shards_equal_the_reference": (
        "False-0-triton", "True-5-mosaic_gpu",
    ),
    f"{_NORM}/test_gpu_kernels.py::test_bfloat16_is_rounded_once": ("mosaic_gpu",),
    f"{_NORM}/test_gpu_kernels.py::test_compiles_for_an_h200_with_next_to_no_spilling": (
        "shape0-packed",
    ),
    f"{_NORM}/test_gpu_kernels.py::test_documents_and_padding_do_not_affect_other_documents": (
        "mosaic_gpu",
    ),
    f"{_NORM}/test_gpu_kernels.py::test_equals_float64": (
        "1000.0-mosaic_gpu", "1000.0-triton",
    ),
    f"{_NORM}/test_triton_aot.py::test_kernels_fit_every_generation": (
        "86-64-64-True", "100-32-32-False", "120-48-16-True",
    ),
    "model/test_ablations.py::test_generation_equals_greedy_decoding_from_whole_sequences": (
        "all, ema",
    ),
    "model/test_ablations.py::test_packed_documents_and_streams_equal_documents_alone": (
        *_ARCHITECTURES,
    ),
    "model/test_ablations.py::test_rematerialization_does_not_change_gradients": ("all, ema",),
    "model/test_carried_state.py::test_a_document_begins_anew_before_its_position_overflows": (
        "scan",
    ),
    "model/test_carried_state.py::test_a_new_document_reads_nothing_of_the_state": ("scan",),
    "model/test_carried_state.py::test_carried_tokens_are_those_of_documents_from_earlier_rows": (
        "scan",
    ),
    "model/test_carried_state.py::test_rematerialization_changes_no_gradient": ("scan",),
    "model/test_carried_state.py::test_states_after_the_rows_are_those_after_the_long_rows": (
        "scan",
    ),
    "model/test_golden_models.py::test_logits_loss_and_every_gradient": (
        "model_a_plain-xla", "model_b_all_on-xla", "model_b_all_on-reference",
        "model_c_short-xla", "model_d_swiglu_L320-xla",
    ),
    "model/test_golden_models.py::test_remat_and_unrolling_do_not_change_gradients": (
        "none-False", "block-True",
    ),
    "modules/test_ablations.py::test_a_block_equals_its_definition": (
        "default", "ema", "no average", *_ARCHITECTURES,
    ),
    "parallel/test_ablations.py::test_a_sharded_cache_equals_an_unsharded_one": ("all, ema",),
    "parallel/test_ablations.py::test_features_of_packed_rows_equal_those_of_one_device": (
        "all, ema",
    ),
    "parallel/test_ablations.py::test_training_equals_one_device": (
        "all, ema-data, chunk", "all, no average-chunk, model",
    ),
    "parallel/test_carry_state.py::test_equals_one_device": ("data, model",),
    f"{_COLLECTIVES}::test_context_parallelism_gathers_states_once_per_layer_and_direction": (
        "block",
    ),
    f"{_COLLECTIVES}::test_fsdp_gathers_weights_per_layer_and_no_activations": (
        "sizes1",
    ),
    "parallel/test_context_parallel.py::test_cema": ("True",),
    "parallel/test_tensor_parallel.py::test_a_gated_model_equals_one_device": ("chunk2-model2",),
    "parallel/test_training.py::test_equals_one_device": (
        "all", "released",
    ),
    "storage/test_checkpoints.py::test_a_damaged_one_is_set_aside_and_an_unfinished_one_removed": (
        "gs",
    ),
    "storage/test_checkpoints.py::test_a_store_that_gives_no_answer_sets_nothing_aside": ("s3",),
    "storage/test_checkpoints.py::test_a_takeover_during_a_save_prevents_its_commit": ("s3",),
    "storage/test_processes.py::test_a_bucket_that_may_not_be_written_ends_the_start": ("s3",),
    "storage/test_processes.py::test_a_killed_run_resumes_bit_for_bit": ("gs",),
    "storage/test_processes.py::test_a_lost_server_ends_the_run": ("s3",),
    "storage/test_processes.py::test_a_run_without_permission_ends_soon": ("gs",),
    "storage/test_processes.py::test_a_second_run_is_refused": ("s3",),
    "storage/test_runs.py::test_a_run_in_a_store_equals_one_on_a_disk": ("s3",),
    "storage/test_runs.py::test_a_run_in_a_store_is_converted_and_started_from": ("gs",),
    "storage/test_runs.py::test_a_run_moves_between_a_disk_and_a_store": ("s3",),
    "test_lora.py::test_every_layer_of_a_model_drops_other_inputs": ("scanned",),
    "test_lora.py::test_outputs_and_gradients_are_those_of_the_dense_sum": (
        "scanned", "transformer",
    ),
    "training/test_ablations.py::test_the_loss_falls": ("rms norm", *_ARCHITECTURES),
    "training/test_own_loop.py::test_a_resumed_run_equals_an_uninterrupted_one": ("Stateful",),
    "training/test_resilience.py::test_a_spike_warns_or_stops": ("stop",),
}  # fmt: skip

# Variants that CI leaves out of tests with many; a test without variants has the empty one.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "bench/test_train.py::test_a_transformer_step_runs_on_this_device": ("",),
    "bench/test_train.py::test_the_transformer_of_the_same_size_is_measured_beside_it": ("",),
    "encoder/test_encoder.py::test_every_parameter_has_a_gradient": ("",),
    "inference/test_speculation.py::test_sessions_are_those_of_plain_decoding": ("",),
    "interop_flax/test_qwix.py::test_dropout_of_lora_differs_in_every_call": ("",),
    "kernels/cema/test_contract.py::test_equals_float64_recurrence": (
        "mosaic_gpu-2-63-5-1-True-None", "mosaic_gpu-1-64-11-8-False-None",
        "triton-1-64-11-8-False-None", "xla-4-500-5-16-False-segment_ids24",
        "mosaic_gpu-4-500-5-16-False-segment_ids25", "mosaic_gpu-1-1000-9-16-True-None",
        "mosaic_gpu-3-3-5-16-True-segment_ids37",
    ),
    "kernels/chunk_attention/test_contract.py::test_matches_released_code": (
        "B2_L20_H1_z32_v64_C32_base0-triton", "B2_L32_H2_z16_v32_C32_base0-triton",
        "B2_L96_H1_z32_v64_C32_base100000-triton",
    ),
    "kernels/chunk_decode/test_contract.py::test_bfloat16_has_the_error_of_its_roundings": (
        "1-5-4-mosaic_gpu", "2-48-7-mosaic_gpu", "1-300-5-mosaic_gpu",
    ),
}  # fmt: skip
