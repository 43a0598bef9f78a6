"""The variants of tests that CI runs; the others are marked `exhaustive`, and `slow`.

Compilation is most of the suite's time, and many tests repeat one check for several models, meshes,
cards or stores. CI has the variants that differ most; `pytest -m exhaustive` runs the others.
"""

_NORM = "kernels/timestep_norm"
_COLLECTIVES = "parallel/test_collectives.py"
_SAMPLING = "inference/test_sampling.py"
_CARRIED = "model/test_carried_state.py"
_MOSAIC_ATTENTION = "kernels/chunk_attention/test_mosaic_gpu.py"

CI_VARIANTS: dict[str, tuple[str, ...]] = {
    "baselines/test_attention_compiled.py::test_cudnn_is_the_default_on_hopper": ("packed",),
    "baselines/test_attention_compiled.py::test_splash_attention_is_the_default_on_tpus": (
        "rows-v6e:1x1",
    ),
    "baselines/test_runs.py::test_plans_count_the_attention_of_the_target": (),
    "baselines/test_transformer.py::test_logits_and_every_gradient_equal_the_definition": (
        "grouped, window, tied",
    ),
    "baselines/test_transformer.py::test_meshes_train_like_one_device": ("three axes",),
    "baselines/test_transformer.py::test_rematerialization_changes_nothing": (),
    "baselines/test_transformer.py::test_streaming_equals_one_call": ("grouped, window, tied",),
    "bench/test_train.py::test_several_lengths_in_one_call": (),
    "data/test_pieces.py::test_batches_do_not_depend_on_the_pieces": (
        "pack-byte_level", "pack-prepend", "pad-sentencepiece",
    ),
    "data/test_pieces.py::test_memory_does_not_depend_on_the_size_of_the_text": ("byte_level",),
    "encoder/test_encoder.py::test_meshes_equal_one_device": ("chunks-sizes2",),
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
    "faults/test_signals.py::test_a_second_signal_during_compilation_leaves_at_once": (),
    "faults/test_signals.py::test_a_signal_between_steps_and_the_end_of_the_resumed_run": ("15",),
    "faults/test_signals.py::test_a_signal_in_an_evaluation_during_training": ("2",),
    "faults/test_signals.py::test_a_signal_in_the_sample": (),
    "inference/test_mesh.py::test_tokens_equal_those_of_one_device": (
        "{'data': 2, 'model': 2}-int8",
    ),
    "inference/test_speculation.py::test_blocks_equal_plain_blocks_whatever_the_drafts": ("0.25",),
    "inference/test_speculation.py::test_several_tokens_at_once_equal_as_many_steps": (),
    "inference/test_step.py::test_steps_equal_the_full_forward_pass": ("default", "all, ema"),
    "inference/test_step_compiled.py::test_a_block_copies_no_cache": ("2-2-model", "16-8-int8"),
    "interop/test_lm_eval.py::test_generation_is_the_greedy_one": ("megalodon-3",),
    "interop_flax/test_qwix.py::test_kernels_may_hold_quantized_arrays": ("int8",),
    "interop_flax/test_qwix.py::test_lora_starts_at_the_base_and_learns_alone": ("True",),
    "interop_flax/test_qwix.py::test_quantized_activations": ("True",),
    "interop_flax/test_qwix.py::test_quantized_weights": ("False-int8",),
    "kernels/cema/test_bidirectional.py::test_equals_the_double_sum_with_gradients": (
        "False-xla", "True-xla",
    ),
    "kernels/cema/test_bidirectional.py::test_sequence_shards_equal_one_device": ("True",),
    "kernels/cema/test_gpu_context_parallel.py::test_shards_equal_the_recurrence": (
        "128-32-True-False-mosaic_gpu",
    ),
    "kernels/cema/test_pallas_tpu.py::test_documents_are_isolated": ("5",),
    "kernels/cema/test_pallas_tpu_aot.py::test_compiles": ("v6e",),
    "kernels/cema/test_triton_aot.py::test_kernels_fit_every_generation": ("86-True", "120-True"),
    f"{_MOSAIC_ATTENTION}::test_equals_float64": ("300-2-widths2-130-documents2",),
    "kernels/chunk_attention/test_pallas_tpu_aot.py::test_compiles": ("v5e",),
    "kernels/chunk_attention/test_triton.py::test_values_in_several_blocks_equal_float64": (
        "bfloat16-False-widths3-triton",
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
        "True-5-mosaic_gpu", "True-None-triton",
    ),
    f"{_NORM}/test_gpu_kernels.py::test_bfloat16_is_rounded_once": (),
    f"{_NORM}/test_gpu_kernels.py::test_compiles_for_an_h200_with_next_to_no_spilling": (
        "shape0-packed",
    ),
    f"{_NORM}/test_gpu_kernels.py::test_documents_and_padding_do_not_affect_other_documents": (),
    f"{_NORM}/test_gpu_kernels.py::test_equals_float64": ("1000.0-triton",),
    f"{_NORM}/test_triton_aot.py::test_kernels_fit_every_generation": (
        "86-64-64-True", "120-48-16-True",
    ),
    "model/test_ablations.py::test_generation_equals_greedy_decoding_from_whole_sequences": (
        "all, ema",
    ),
    "model/test_ablations.py::test_packed_documents_and_streams_equal_documents_alone": (
        "all, ema",
    ),
    "model/test_ablations.py::test_rematerialization_does_not_change_gradients": (),
    f"{_CARRIED}::test_a_document_begins_anew_before_its_position_overflows": ("scan",),
    f"{_CARRIED}::test_a_new_document_reads_nothing_of_the_state": ("scan",),
    f"{_CARRIED}::test_carried_tokens_are_those_of_documents_from_earlier_rows": ("scan",),
    f"{_CARRIED}::test_rematerialization_changes_no_gradient": ("scan",),
    f"{_CARRIED}::test_states_after_the_rows_are_those_after_the_long_rows": ("scan",),
    "model/test_golden_models.py::test_logits_loss_and_every_gradient": (
        "model_b_all_on-xla", "model_b_all_on-reference", "model_d_swiglu_L320-xla",
    ),
    "model/test_golden_models.py::test_remat_and_unrolling_do_not_change_gradients": (
        "block-True",
    ),
    "modules/test_ablations.py::test_a_block_equals_its_definition": ("ema", "all, no average"),
    "parallel/test_ablations.py::test_a_sharded_cache_equals_an_unsharded_one": (),
    "parallel/test_ablations.py::test_features_of_packed_rows_equal_those_of_one_device": (),
    "parallel/test_ablations.py::test_training_equals_one_device": ("all, ema-data, chunk",),
    "parallel/test_carry_state.py::test_equals_one_device": ("data, model",),
    f"{_COLLECTIVES}::test_context_parallelism_gathers_states_once_per_layer_and_direction": (
        "block",
    ),
    f"{_COLLECTIVES}::test_fsdp_gathers_weights_per_layer_and_no_activations": ("sizes1",),
    "parallel/test_context_parallel.py::test_cema": ("True",),
    "parallel/test_tensor_parallel.py::test_a_gated_model_equals_one_device": ("chunk2-model2",),
    "parallel/test_training.py::test_equals_one_device": ("all",),
    "storage/test_checkpoints.py::test_a_damaged_one_is_set_aside_and_an_unfinished_one_removed": (
        "gs",
    ),
    "storage/test_checkpoints.py::test_a_store_that_gives_no_answer_sets_nothing_aside": ("s3",),
    "storage/test_checkpoints.py::test_a_takeover_during_a_save_prevents_its_commit": ("s3",),
    "storage/test_processes.py::test_a_bucket_that_may_not_be_written_ends_the_start": ("s3",),
    "storage/test_processes.py::test_a_killed_run_resumes_bit_for_bit": ("gs",),
    "storage/test_processes.py::test_a_lost_server_ends_the_run": ("s3",),
    "storage/test_processes.py::test_a_run_without_permission_ends_soon": (),
    "storage/test_processes.py::test_a_second_run_is_refused": (),
    "storage/test_runs.py::test_a_run_in_a_store_equals_one_on_a_disk": ("s3",),
    "storage/test_runs.py::test_a_run_in_a_store_is_converted_and_started_from": ("gs",),
    "storage/test_runs.py::test_a_run_moves_between_a_disk_and_a_store": (),
    "test_lora.py::test_every_layer_of_a_model_drops_other_inputs": ("scanned",),
    "test_lora.py::test_outputs_and_gradients_are_those_of_the_dense_sum": ("scanned",),
    "training/test_ablations.py::test_the_loss_falls": (),
    "training/test_own_loop.py::test_a_resumed_run_equals_an_uninterrupted_one": ("Stateful",),
    "training/test_resilience.py::test_a_spike_warns_or_stops": ("stop",),
}  # fmt: skip

# Variants that CI leaves out of tests with many; a test without variants has the empty one.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "baselines/test_attention.py::test_a_loop_over_heads_and_rows_changes_nothing": ("None",),
    "baselines/test_attention.py::test_outputs_and_gradients_are_those_of_the_definition": (
        "reference-one document", "reference-grouped", "reference-window of one",
        "reference-window of the row", "reference-many documents", "reference-packed",
        "reference-window", "xla-one document", "xla-window of the row",
    ),
    "baselines/test_attention.py::test_splash_attention_in_the_interpreter": ("grouped",),
    "baselines/test_attention_compiled.py::test_a_decode_step_writes_the_donated_cache_in_place": (
        "h100_device-1-16", "v5e_device-0-16",
    ),
    "baselines/test_attention_compiled.py::test_a_piece_of_a_prompt_reads_its_cache_by_cudnn": (
        "window",
    ),
    "baselines/test_cached_attention.py::test_blocks_of_keys_and_queries_change_nothing": ("600",),
    "baselines/test_cached_attention.py::test_documents_and_padding_in_pieces": ("None-30",),
    "baselines/test_cached_attention.py::test_pieces_equal_the_row": (
        "decode between-ring never full", "decode between-larger ring",
        "decode between-spare slots", "decode first-full", "decode first-larger ring",
        "decode first-ring of the window", "whole-full", "whole-larger ring",
        "whole-ring never full",
    ),
    "baselines/test_runs.py::test_a_resumed_run_equals_an_uninterrupted_one": ("",),
    "bench/test_ops.py::test_attention_flops_are_those_of_the_pairs": ("plain", "packed"),
    "bench/test_ops.py::test_errors_of_every_result_and_gradient": (
        "chunk_attention-carried", "chunk_attention-plain", "cema-plain", "cema-packed",
        "timestep_norm-carried", "timestep_norm-packed", "noncausal_attention-plain",
    ),
    "bench/test_reference.py::test_gradients_have_names": ("",),
    "bench/test_scaling.py::test_two_meshes_of_eight_devices": ("",),
    "bench/test_train.py::test_a_step_over_a_mesh_beside_its_plan": ("",),
    "bench/test_train.py::test_a_transformer_step_runs_on_this_device": ("",),
    "bench/test_train.py::test_the_transformer_of_the_same_size_is_measured_beside_it": ("",),
    "checkpoints/test_manager.py::test_a_damaged_checkpoint_is_named_and_the_previous_one_loaded": (
        "empty",
    ),
    "data/test_loader.py::test_batches_do_not_depend_on_the_number_of_loaders": ("4",),
    "encoder/test_drop_path.py::test_evaluation_has_no_drop_path": ("megalodon",),
    "encoder/test_encoder.py::test_every_parameter_has_a_gradient": ("",),
    "encoder/test_golden.py::test_bidirectional_cema": ("L77-False",),
    "encoder/test_golden.py::test_classifier": (
        "classifier_tokens-full_pre_norm-False", "classifier_tokens-full_two_hop-False",
        "classifier_pixels-full_two_hop-False",
    ),
    "encoder/test_golden.py::test_layer": (
        "full_two_hop-False", "full_padded_two_hop-False", "chunk_16_two_hop-False",
        "chunk_16_of_50_two_hop-False", "full_pre_norm-False", "chunk_16_silu_two_hop-False",
    ),
    "encoder/test_transformer_encoder.py::test_dropout_and_remat_and_unrolled_blocks": ("",),
    "faults/test_checkpoints.py::test_two_processes_are_refused_together": ("",),
    "faults/test_signals.py::test_a_second_signal_in_the_evaluation_leaves_at_once": ("",),
    "faults/test_signals.py::test_sigterm_in_the_final_evaluation": ("",),
    "inference/test_int8_keys_and_values.py::test_several_positions_at_once_are_the_steps": ("",),
    "inference/test_prefill.py::test_pieces_equal_one_pass": ("16", "87"),
    f"{_SAMPLING}::test_a_rows_tokens_do_not_depend_on_slot_neighbours_and_batch_size": ("32001",),
    f"{_SAMPLING}::test_draws_follow_the_filtered_probabilities": ("1", "2", "4", "5", "7", "8"),
    f"{_SAMPLING}::test_only_tokens_of_the_mask_are_drawn": ("32", "1"),
    f"{_SAMPLING}::test_rows_draw_the_same_tokens_with_features_that_they_do_not_use": (
        "257-1001",
    ),
    f"{_SAMPLING}::test_scores_have_the_same_bits_with_features_that_a_row_does_not_use": (
        "32001",
    ),
    f"{_SAMPLING}::test_top_k_keeps_the_first_k_of_a_stable_sort": ("32001", "2"),
    f"{_SAMPLING}::test_top_p_keeps_the_smallest_set_that_reaches_p": ("32001", "2"),
    "inference/test_speculation.py::test_nothing_compiles_after_warm_up": ("",),
    "inference/test_speculation.py::test_sessions_are_those_of_plain_decoding": ("",),
    "inference/test_step.py::test_a_block_of_steps_updates_the_cache_in_place": ("model",),
    "interop/test_lm_eval.py::test_loglikelihood_equals_full_passes": (
        "megalodon-1", "megalodon-64",
    ),
    "interop/test_lm_eval.py::test_samples_depend_on_the_seed_and_the_request_alone": ("",),
    "interop/test_vocabulary.py::test_scores_of_old_tokens_stay": ("False",),
    "interop_flax/test_hidden_states.py::test_embeddings_in_place_of_tokens": ("transformer",),
    "interop_flax/test_hidden_states.py::test_hidden_states_are_the_features_between_blocks": (
        "transformer",
    ),
    "interop_flax/test_hidden_states.py::test_hidden_states_while_streaming": ("",),
    "interop_flax/test_linen.py::test_gradients_equal_those_of_nnx": ("",),
    "interop_flax/test_nnx.py::test_export_with_symbolic_rows": ("megalodon",),
    "interop_flax/test_nnx.py::test_forward_mode_by_two_transpositions": ("",),
    "interop_flax/test_nnx.py::test_optimizer_takes_the_step_of_the_pure_form": ("",),
    "interop_flax/test_nnx.py::test_second_derivatives_of_the_model": ("",),
    "interop_flax/test_nnx.py::test_vmap_over_models_and_over_rows": ("",),
    "interop_flax/test_qwix.py::test_dropout_of_lora_differs_in_every_call": ("",),
    "interop_flax/test_qwix.py::test_transformer": ("",),
    "kernels/cema/test_contract.py::test_bfloat16_input_is_computed_in_float32": (
        "triton", "mosaic_gpu",
    ),
    "kernels/cema/test_contract.py::test_equals_float64_recurrence": (
        "mosaic_gpu-2-63-5-1-True-None", "mosaic_gpu-1-64-11-8-False-None",
        "triton-1-64-11-8-False-None", "xla-4-500-5-16-False-segment_ids24",
        "mosaic_gpu-4-500-5-16-False-segment_ids25", "mosaic_gpu-1-1000-9-16-True-None",
        "mosaic_gpu-3-3-5-16-True-segment_ids37", "xla-1-1000-9-16-True-None",
        "triton-2-63-5-1-True-None", "xla-2-63-5-1-True-None",
    ),
    "kernels/cema/test_contract.py::test_packed_documents_equal_documents_alone": ("triton", "xla"),
    "kernels/cema/test_contract.py::test_padding_leaves_the_state_unchanged": ("mosaic_gpu",),
    "kernels/cema/test_contract.py::test_streaming_equals_one_call": ("triton", "mosaic_gpu"),
    "kernels/cema/test_final_state.py::test_equals_float64_recurrence": (
        "True-5000", "False-150", "True-64", "False-1",
    ),
    "kernels/cema/test_golden.py::test_outputs_and_gradients_equal_released_code": (
        "B2_L1_D16_N16_hx-reference", "B2_L1_D16_N16_hx-xla", "B2_L7_D16_N16-reference",
        "B2_L7_D16_N16_hx-reference", "B2_L7_D16_N16_hx-xla", "B2_L64_D16_N16-reference",
        "B2_L64_D16_N16-xla", "B2_L64_D16_N16_hx-reference", "B2_L200_D16_N16-reference",
        "B2_L200_D16_N16-xla", "B2_L200_D16_N16_hx-reference", "B2_L200_D16_N16_hx-xla",
        "B2_L1000_D16_N16-reference", "B2_L1000_D16_N16_hx-reference", "B2_L1000_D16_N16_hx-xla",
        "B1_L64_D16_N16_hx-reference", "B1_L64_D16_N16_hx-xla", "B1_L200_D16_N16_hx-reference",
        "B1_L200_D16_N16_hx-xla", "B9_L64_D16_N16_hx-reference", "B9_L64_D16_N16_hx-xla",
        "B9_L40_D16_N16-reference", "B2_L128_D16_N8-reference", "B2_L128_D16_N8-xla",
    ),
    "kernels/cema/test_pallas_tpu.py::test_bfloat16_is_as_good_as_its_output": ("",),
    "kernels/cema/test_pallas_tpu.py::test_streaming_equals_one_call": ("",),
    "kernels/chunk_attention/test_contract.py::test_bfloat16": ("reference",),
    "kernels/chunk_attention/test_contract.py::test_matches_definition": ("31", "32", "63"),
    "kernels/chunk_attention/test_contract.py::test_matches_released_code": (
        "B2_L20_H1_z32_v64_C32_base0-triton", "B2_L32_H2_z16_v32_C32_base0-triton",
        "B2_L96_H1_z32_v64_C32_base100000-triton", "B2_L20_H1_z32_v64_C32_base0-reference",
        "B2_L20_H1_z32_v64_C32_base0-xla", "B2_L32_H2_z16_v32_C32_base0-reference",
        "B2_L32_H2_z16_v32_C32_base0-xla", "B2_L96_H1_z32_v64_C32_base100000-reference",
        "B2_L96_H2_z16_v32_C32_base0-xla", "B1_L256_H4_z16_v32_C64_base100000-reference",
        "B2_L96_H2_z16_v32_C32_base0-triton",
    ),
    "kernels/chunk_attention/test_contract.py::test_packed_documents_equal_documents_alone": (
        "reference",
    ),
    "kernels/chunk_attention/test_contract.py::test_rows_at_different_positions": (
        "sizes0-reference", "sizes1-reference",
    ),
    "kernels/chunk_attention/test_contract.py::test_rows_of_padding_alone": (
        "1-reference", "5-reference", "1-triton",
    ),
    "kernels/chunk_attention/test_contract.py::test_streaming_equals_one_call": (
        "reference", "triton",
    ),
    "kernels/chunk_attention/test_dropout.py::test_gradients_use_the_same_mask": (
        "softmax-reference", "dropkey-reference",
    ),
    f"{_MOSAIC_ATTENTION}::test_documents_are_independent_of_others_and_of_padding": ("",),
    f"{_MOSAIC_ATTENTION}::test_packed_rows_after_a_cache_equal_float64": ("",),
    "kernels/chunk_attention/test_noncausal.py::test_matches_definition_with_gradients": (
        "whole-False-xla", "packed-False-xla", "aligned chunks-False-xla", "one chunk-False-triton",
        "packed-False-triton", "whole-True-triton",
    ),
    "kernels/chunk_attention/test_noncausal.py::test_result_is_independent_of_tiles_and_groups": (
        "packed", "aligned chunks",
    ),
    "kernels/chunk_attention/test_noncausal.py::test_sequence_shards_equal_one_device": (
        "packed", "aligned chunks", "chunks",
    ),
    "kernels/chunk_attention/test_pallas_tpu.py::test_aligned_chunks": ("2-65-32", "2-600-130"),
    "kernels/chunk_attention/test_pallas_tpu.py::test_cache_and_rows_at_different_positions": (
        "300",
    ),
    "kernels/chunk_decode/test_contract.py::test_a_row_does_not_depend_on_its_neighbours": (
        "mosaic_gpu",
    ),
    "kernels/chunk_decode/test_contract.py::test_bfloat16_has_the_error_of_its_roundings": (
        "1-5-4-mosaic_gpu", "2-48-7-mosaic_gpu", "1-300-5-mosaic_gpu", "1-5-4-reference",
        "2-48-7-reference", "1-300-5-reference", "1-5-4-pallas_tpu", "1-300-5-pallas_tpu",
        "3-130-4-pallas_tpu",
    ),
    "kernels/chunk_decode/test_contract.py::test_equals_the_definition": (
        "reference-1-5-4-6-4-float32", "reference-2-48-8-5-7-float64",
        "reference-3-130-3-10-4-float64", "reference-1-300-16-8-5-float32",
        "reference-3-130-3-10-4-float32",
    ),
    "kernels/chunk_decode/test_contract.py::test_extreme_scores": ("0.0-mosaic_gpu",),
    "kernels/chunk_decode/test_int8.py::test_equals_the_definition": ("reference-float32-48-7",),
    "kernels/chunk_decode/test_int8.py::test_the_kernels_add_in_float32": (
        "tiling1-150-positions1",
    ),
    "kernels/chunk_decode/test_mosaic_gpu.py::test_tilings": (
        "tiling0-200-positions0", "tiling3-200-positions3",
    ),
    "kernels/norm_state_step/test_contract.py::test_equals_the_definition": (
        "mosaic_gpu-False-66-66-4-32-2",
    ),
    "kernels/norm_state_step/test_mosaic_gpu_aot.py::test_kernel_fits_into_registers": (
        "256-32-32", "2-32-32",
    ),
    "kernels/rowwise/test_contract.py::test_results_and_gradients": (
        "mosaic_gpu-layer_norm-names4-5-384", "mosaic_gpu-layer_norm-names6-5-384",
        "mosaic_gpu-layer_norm-names7-5-384", "mosaic_gpu-rms_norm-names8-5-384",
        "mosaic_gpu-silu-names9-5-384", "mosaic_gpu-silu_gate-names10-5-384",
        "mosaic_gpu-silu-names2-37-128", "reference-layer_norm-names6-5-384",
        "reference-layer_norm-names7-5-384", "reference-rms_norm-names8-5-384",
        "reference-silu-names9-5-384", "reference-silu_gate-names10-5-384",
        "triton-layer_norm-names6-5-384", "triton-layer_norm-names7-5-384",
        "triton-rms_norm-names8-5-384", "triton-silu-names9-5-384",
        "triton-silu_gate-names10-5-384",
    ),
    "kernels/state_step/test_contract.py::test_float32_state": (
        "reference-bfloat16-3-5-384-4", "reference-bfloat16-2-3-256-1",
        "mosaic_gpu-bfloat16-1-1-128-16",
    ),
    "kernels/state_step/test_contract.py::test_float64_equals_the_equations": (
        "reference-2-2-48-16", "reference-1-1-5-1",
    ),
    "kernels/state_step/test_contract.py::test_rows_that_are_not_active_keep_their_state": (
        "reference-5", "mosaic_gpu-66",
    ),
    "kernels/test_blackwell_aot.py::test_kernels_without_wgmma_compile": ("100",),
    f"{_NORM}/test_gpu_kernels.py::test_packed_rows_equal_float64": ("triton",),
    f"{_NORM}/test_pallas_tpu.py::test_documents_do_not_affect_each_other": ("",),
    f"{_NORM}/test_pallas_tpu.py::test_rows": ("200-256-1", "300-128-2"),
    f"{_NORM}/test_pallas_tpu_aot.py::test_compiles_where_it_is_the_default": (
        "v5e-shape1-64-True",
    ),
    f"{_NORM}/test_pallas_tpu_aot.py::test_float32_and_wide_padded_groups_compile": ("",),
    f"{_NORM}/test_timestep_norm.py::test_bfloat16_input_has_float32_moments": ("reference",),
    f"{_NORM}/test_timestep_norm.py::test_gradients_match_float64": ("reference",),
    f"{_NORM}/test_timestep_norm.py::test_matches_moments_of_all_numbers": (
        "100-12-3-reference", "1-4-2-reference", "2-12-1-xla",
    ),
    f"{_NORM}/test_timestep_norm.py::test_matches_released_code": (
        "B2_L300_D32_G4_prev_mask-reference", "B2_L7_D64_G8-xla", "B2_L64_D64_G8-xla",
        "B2_L64_D64_G8_prev-xla", "B2_L300_D32_G4-xla", "B2_L300_D32_G4_prev-xla",
        "B2_L200_D32_G4-xla", "B2_L1_D64_G8-reference", "B2_L7_D64_G8_prev-xla",
        "B2_L200_D32_G4_prev-xla", "B2_L1_D64_G8-xla",
    ),
    f"{_NORM}/test_timestep_norm.py::test_packed_documents_equal_documents_alone": (
        "no prior-xla", "prior-reference",
    ),
    f"{_NORM}/test_timestep_norm.py::test_pieces_with_state_equal_the_whole": ("reference",),
    f"{_CARRIED}::test_gradients_are_those_of_long_rows_that_stop_at_the_borders": ("written_out",),
    f"{_CARRIED}::test_the_loss_of_rows_that_continue_each_other_is_that_of_long_rows": (
        "written_out",
    ),
    "model/test_golden_models.py::test_bfloat16_error_is_at_most_that_of_the_released_code": (
        "a_plain", "d_swiglu_L320",
    ),
    "model/test_golden_models.py::test_stream": ("stream_a_plain_p20_decode",),
    "model/test_model.py::test_dropout": ("rates1", "rates2"),
    "model/test_model.py::test_initial_values": ("bert", "gaussian"),
    "model/test_skip_attention.py::test_prefill_and_decoding_skip_the_same": ("pre-norm",),
    "model/test_skip_attention.py::test_skipped_attention_is_attention_that_gives_zero": (
        "1-pre-norm", "2-pre-norm", "2-transformer",
    ),
    "modules/test_ablations.py::test_ema_equals_the_recurrence_and_cema_at_angle_zero": (
        "reference",
    ),
    "modules/test_golden_modules.py::test_attention_layer": ("H2_L20_C32_N8_z64_base100000",),
    f"{_COLLECTIVES}::test_gradient_reduction_of_a_block_overlaps_the_next_backward": ("1-0",),
    "parallel/test_context_parallel.py::test_timestep_norm": ("0-True", "0-False"),
    "parallel/test_tensor_parallel.py::test_products_and_gradients_are_those_of_whole_matrices": (
        "data2-model4", "replica2-model4",
    ),
    "plan/test_plan.py::test_too_large_for_the_chip": ("",),
    "plan/test_plan.py::test_tpu_kernels_are_compiled": ("",),
    "storage/test_checkpoints.py::test_restore_is_bitwise_and_old_ones_go": ("gs",),
    "storage/test_data.py::test_hugging_face_streams_from_a_store": ("gs",),
    "storage/test_data.py::test_workers_read_a_store": ("gs",),
    "storage/test_processes.py::test_two_processes_share_a_run_on_gs": ("gs",),
    "storage/test_tokenizer.py::test_a_changed_original_does_not_matter_but_a_changed_copy_does": (
        "sentencepiece",
    ),
    "storage/test_tokenizer.py::test_a_moved_run_needs_no_original": ("sentencepiece",),
    "study/test_study.py::test_a_study_of_images_has_accuracies": ("",),
    "training/test_carry_state.py::test_a_state_restores_with_blocks_written_out": ("",),
    "training/test_loop.py::test_a_signal_saves_after_the_step_and_resuming_changes_nothing": (
        "2",
    ),
    "training/test_lora.py::test_factors_with_carried_states_resume_bit_for_bit": ("",),
    "training/test_lora.py::test_meshes_and_rematerialization_change_nothing": ("",),
    "training/test_optimizers.py::test_a_resumed_run_equals_an_uninterrupted_one": ("",),
    "training/test_own_loop.py::test_a_loss_of_your_own": ("",),
}  # fmt: skip

# Variants that are only `slow`: others of the same test are quick.
SLOW_VARIANTS: dict[str, tuple[str, ...]] = {
    "baselines/test_attention_compiled.py::test_a_decode_step_writes_the_donated_cache_in_place": (
        "h100_device-1-4",
    ),
    "data/test_loader.py::test_batches_do_not_depend_on_the_number_of_loaders": ("1",),
    "encoder/test_encoder.py::test_packed_documents_are_computed_alone": ("patches", "full"),
    "encoder/test_golden.py::test_layer": (
        "chunk_16_of_50_two_hop-True", "chunk_16_of_50_pre_norm-False",
        "full_padded_silu_layer_scale_pre_norm-False",
    ),
    "evaluation/test_context.py::test_perplexity_equals_whole_rows": ("megalodon",),
    "evaluation/test_examples.py::test_a_round_of_self_improvement_reads_what_it_wrote": (
        "megalodon",
    ),
    "kernels/cema/test_angle_zero.py::test_equals_float64_recurrence": ("xla-3-65-2",),
    "kernels/cema/test_contract.py::test_documents_are_isolated": ("mosaic_gpu", "triton"),
    "kernels/cema/test_contract.py::test_equals_float64_recurrence": (
        "mosaic_gpu-3-65-3-2-True-segment_ids13", "triton-3-65-3-2-True-segment_ids15",
        "xla-1-64-11-8-False-None", "xla-4-500-5-16-True-segment_ids20",
    ),
    "kernels/cema/test_contract.py::test_padding_values_have_no_influence": ("triton",),
    "kernels/cema/test_final_state.py::test_equals_float64_recurrence": ("False-5000",),
    "kernels/chunk_attention/test_contract.py::test_documents_are_independent": ("triton",),
    "kernels/chunk_attention/test_noncausal.py::test_result_is_independent_of_tiles_and_groups": (
        "packed chunks",
    ),
    "kernels/chunk_decode/test_contract.py::test_extreme_scores": ("10000.0-mosaic_gpu",),
    "kernels/chunk_decode/test_contract.py::test_gate": ("mosaic_gpu",),
    "kernels/norm_state_step/test_contract.py::test_equals_the_definition": (
        "mosaic_gpu-True-66-66-4-32-2",
    ),
    "kernels/state_step/test_contract.py::test_token_by_token_equals_the_sequence": ("mosaic_gpu",),
    "model/test_ablations.py::test_packed_documents_and_streams_equal_documents_alone": (
        "all, ema",
    ),
    "model/test_golden_models.py::test_logits_loss_and_every_gradient": (
        "model_d_swiglu_L320-xla", "model_b_all_on-reference",
    ),
    "model/test_model.py::test_dropout": ("rates3",),
    "study/test_definition.py::test_shipped_studies_can_run": ("ablations_30M", "head_to_head_30M"),
    "test_lora.py::test_outputs_and_gradients_are_those_of_the_dense_sum": ("scanned",),
}  # fmt: skip
