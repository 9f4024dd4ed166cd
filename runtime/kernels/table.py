"""The whole kernel table."""

from __future__ import annotations

from headrace.kernels import (
    attention,
    attention_rows,
    bitstack,
    clusters,
    convolution,
    convolution_u8,
    depthwise,
    depthwise_u8,
    dynamic_columns,
    dynamic_u8,
    execute,
    expert_cache,
    expert_visits,
    experts,
    finishes,
    gelu,
    image_copies,
    image_operators,
    image_operators_u8,
    images,
    images_u8,
    layer_norm,
    mask,
    moments,
    n_bits_rows,
    prepare,
    probe,
    product_rows,
    recall,
    recurrent,
    rows,
    softmax_mean,
    softmax_rows,
    sparse_product,
    sparse_product_u8,
    sparse_tiles,
    taking,
    zero_computation,
)
from headrace.offload import expert_store, requests
from headrace.sparse import gqs_columns, gqs_kernels, linear, n_bits
from headrace.targets.table import Kernel


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name; dispatch, tests and benchmarks loop over it."""
    return {row.name: row for row in all_rows()}


def all_rows() -> list[Kernel]:
    """Every kernel; no two have one name."""
    return [
        *linear.all_kernels(),
        *n_bits.all_kernels(),
        *gqs_kernels.all_kernels(),
        *gqs_columns.all_kernels(),
        *n_bits_rows.all_kernels(),
        *prepare.all_kernels(),
        *convolution.all_kernels(),
        *depthwise.all_kernels(),
        *images.all_kernels(),
        *sparse_product.all_kernels(),
        *sparse_tiles.all_kernels(),
        *softmax_mean.all_kernels(),
        *mask.all_kernels(),
        *recurrent.all_kernels(),
        *convolution_u8.all_kernels(),
        *depthwise_u8.all_kernels(),
        *dynamic_u8.all_kernels(),
        *dynamic_columns.all_kernels(),
        *sparse_product_u8.all_kernels(),
        *images_u8.all_kernels(),
        *finishes.all_kernels(),
        *image_operators.all_kernels(),
        *image_operators_u8.all_kernels(),
        *image_copies.all_kernels(),
        *layer_norm.all_kernels(),
        *moments.all_kernels(),
        *rows.all_kernels(),
        *taking.all_kernels(),
        *softmax_rows.all_kernels(),
        *product_rows.all_kernels(),
        *gelu.all_kernels(),
        *attention_rows.all_kernels(),
        *bitstack.all_kernels(),
        *attention.all_kernels(),
        *execute.all_kernels(),
        *clusters.all_kernels(),
        *experts.all_kernels(),
        *expert_visits.all_kernels(),
        *expert_cache.all_kernels(),
        *probe.all_kernels(),
        *recall.all_kernels(),
        *zero_computation.all_kernels(),
        *requests.all_kernels(),
        *expert_store.all_kernels(),
    ]
