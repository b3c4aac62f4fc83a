/* The callback of a llama.cpp context that evaluates affine laws between two nodes of its graph (see native.py).
 *
 *     y_k[row] += (target - z_k[row] R - y_k[row] S) G'
 *
 * for each row of the batch that a law steers at block k: z_k is the residual stream at the block's input, y_k its output
 * (the tensor "l_out-k"), and R, S, G (d, m) and target (m) are the law's. Laws inside attention read nothing (R = S =
 * 0), and y_k is the product of its output projection, which is the node after "kqv_out-k". llama.cpp asks about every
 * node of the graph whether it is wanted, and computes up to the next one that is; so that this is answered here is what
 * makes it fast.
 *
 * A stage is the place of such a tensor in the order of the graph: -1 for z_0, 2k for the projection of block k, 2k + 1
 * for its output.
 *
 * Nothing of ggml is linked or included: its functions arrive as pointers. A batch that is larger than the context's
 * n_ubatch comes as several graphs, of n_ubatch consecutive rows each. The last block's output has only the rows whose
 * logits are wanted. Everything here runs on the thread that called llama_decode.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef const char *(*name_function)(const void *tensor);
typedef int64_t (*elements_function)(const void *tensor);
typedef size_t (*bytes_function)(const void *tensor);
typedef void (*get_function)(const void *tensor, void *values, size_t offset, size_t size);
typedef void (*set_function)(void *tensor, const void *values, size_t offset, size_t size);
typedef bool (*eval_function)(void *tensor, bool ask, void *user_data);

/* One law at one stage, and the rows that it steers there. */
struct part {
    const float *read_input;  /* (m, d): R', or NULL where z is not read */
    const float *read_output; /* (m, d): S', or NULL where y is not read */
    const float *target;      /* (m) */
    const float *gain;        /* (m, d): G' */
    const int32_t *rows;      /* rows of the batch, ascending */
    int32_t concepts;         /* m */
    int32_t count;            /* of rows */
};

struct stage {
    const struct part *parts;
    int32_t count;
};

/* What a callback did not expect; 0 for nothing. */
enum { FINE, NOT_FLOATS, OTHER_ROWS, NO_INPUT };

struct hook {
    name_function name;
    name_function operation;
    elements_function elements;
    bytes_function bytes;
    get_function get;
    set_function set;
    eval_function instead; /* not NULL: answers everything in the place of this one */
    void *instead_data;
    const char *const *inputs; /* names that z_0 has in graphs, the last of them in any; none begins with l or k */
    const struct stage *stages; /* (2 layers) */
    const int32_t *outputs; /* rows of the batch whose logits are wanted, ascending */
    float *input;           /* (ubatch, d): rows of z_k, of the block that comes next */
    float *output;          /* (ubatch, d) */
    uint8_t *overflowed;    /* for each row of the batch, whether |y|^2 was not finite at a block that steers it */
    float *errors;          /* as many as the law with the most concepts has */
    int32_t layers, width, ubatch;
    int32_t tokens, output_count; /* of the batch */
    int32_t reads_first;          /* whether any law at block 0 reads z_0 */
    /* Where the callback is. */
    int32_t start, rows; /* of the graph at hand, in the batch */
    int32_t asked;       /* the stage last asked about; `2 layers` before a batch */
    int32_t projection;  /* the stage of the product that comes next, -1 for none */
    int32_t held;        /* the block whose input is held, -1 for none */
    int32_t held_first;  /* the first row held, counted from `start` */
    int32_t held_count;
    int32_t overflows;
    int32_t applied; /* how many rows have been steered, counted again at every stage */
    int32_t failure, failed_layer;
};

struct span {
    int32_t first, last; /* positions in a tensor, last excluded; empty where first >= last */
};

/* How many of the ascending rows are below `limit`. */
static int32_t below(const int32_t *rows, int32_t count, int32_t limit) {
    int32_t low = 0, high = count;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (rows[middle] < limit) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static int32_t outputs_before(const struct hook *hook, int32_t row) {
    return below(hook->outputs, hook->output_count, row);
}

static bool is_last(const struct hook *hook, int32_t stage) {
    return stage == 2 * hook->layers - 1;
}

static int32_t layer_of(int32_t stage) {
    return stage < 0 ? -1 : stage / 2;
}

static bool is_projection(int32_t stage) {
    return stage >= 0 && stage % 2 == 0;
}

/* Where a row of the batch stands in the tensor of a stage in the graph at hand; -1 where it is not there. */
static int32_t position(const struct hook *hook, int32_t stage, int32_t row) {
    if (!is_last(hook, stage)) {
        return row - hook->start;
    }
    int32_t at = outputs_before(hook, row);
    return at < hook->output_count && hook->outputs[at] == row ? at - outputs_before(hook, hook->start) : -1;
}

/* How many rows the tensor of a stage has in the graph at hand. */
static int32_t rows_of(const struct hook *hook, int32_t stage) {
    if (!is_last(hook, stage)) {
        return hook->rows;
    }
    return outputs_before(hook, hook->start + hook->rows) - outputs_before(hook, hook->start);
}

/* From the first to the last row of the graph that is steered at a stage; with `reading`, by laws that read z. */
static struct span steered(const struct hook *hook, int32_t stage, bool reading) {
    struct span span = {hook->rows, 0};
    const struct stage *here = &hook->stages[stage];
    for (int32_t i = 0; i < here->count; i++) {
        const struct part *part = &here->parts[i];
        if (reading && !part->read_input) {
            continue;
        }
        int32_t from = below(part->rows, part->count, hook->start);
        int32_t to = below(part->rows, part->count, hook->start + hook->rows);
        if (from == to) {
            continue;
        }
        int32_t first = part->rows[from] - hook->start, last = part->rows[to - 1] - hook->start + 1;
        span.first = first < span.first ? first : span.first;
        span.last = last > span.last ? last : span.last;
    }
    return span;
}

static struct span together(struct span a, struct span b) {
    if (a.first >= a.last) {
        return b;
    }
    if (b.first >= b.last) {
        return a;
    }
    struct span span = {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
    return span;
}

/* The rows of a stage's tensor that are needed: those steered there, and of a block's output those whose next block
 * reads it. The last block's are positions among the outputs. */
static struct span needed(const struct hook *hook, int32_t stage) {
    if (stage < 0) {
        return steered(hook, 1, true);
    }
    struct span own = steered(hook, stage, false);
    if (is_projection(stage)) {
        return own;
    }
    if (is_last(hook, stage)) {
        struct span all = {0, own.first < own.last ? rows_of(hook, stage) : 0};
        return all;
    }
    return together(own, steered(hook, stage + 2, true));
}

/* The number that a name has after this beginning, or -1. */
static int32_t number_after(const char *beginning, const char *name) {
    size_t length = strlen(beginning);
    if (strncmp(name, beginning, length) != 0 || name[length] == 0) {
        return -1;
    }
    int32_t number = 0;
    for (const char *digit = name + length; *digit; digit++) {
        if (*digit < '0' || *digit > '9' || number > 1000000) {
            return -1;
        }
        number = 10 * number + (*digit - '0');
    }
    return number;
}

static bool is_input(const struct hook *hook, const char *name) {
    for (const char *const *one = hook->inputs; *one; one++) {
        if (strcmp(name, *one) == 0) {
            return true;
        }
    }
    return false;
}

/* Another graph begins: the next rows of the batch. */
static void begin(struct hook *hook) {
    hook->start += hook->rows;
    int32_t left = hook->tokens - hook->start;
    hook->rows = left < hook->ubatch ? left : hook->ubatch;
    hook->held = hook->projection = -1;
}

static bool fail(struct hook *hook, int32_t failure, int32_t layer) {
    if (!hook->failure) {
        hook->failure = failure;
        hook->failed_layer = layer;
    }
    return true; /* the pass goes on unsteered and is refused afterwards */
}

/* Sixteen sums side by side, which a compiler turns into vector operations though it may not reorder a sum. */
static float product(const float *a, const float *b, int32_t count) {
    float sums[16] = {0};
    int32_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int32_t j = 0; j < 16; j++) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    float rest = 0;
    for (; i < count; i++) {
        rest += a[i] * b[i];
    }
    for (int32_t half = 8; half; half /= 2) {
        for (int32_t j = 0; j < half; j++) {
            sums[j] += sums[j + half];
        }
    }
    return sums[0] + rest;
}

/* y += (target - z R - y S) G', with `errors` (m) to work in. */
static void steer_row(const struct part *part, const float *z, float *y, int32_t width, float *errors) {
    for (int32_t j = 0; j < part->concepts; j++) {
        size_t at = (size_t)j * width;
        errors[j] = part->target[j];
        if (part->read_input) {
            errors[j] -= product(part->read_input + at, z, width);
        }
        if (part->read_output) {
            errors[j] -= product(part->read_output + at, y, width);
        }
    }
    for (int32_t j = 0; j < part->concepts; j++) {
        const float *gain = part->gain + (size_t)j * width;
        for (int32_t i = 0; i < width; i++) {
            y[i] += errors[j] * gain[i];
        }
    }
}

/* Change `hook->output`, which has the rows `span` of a stage's tensor, as the laws at that stage say. */
static bool steer_stage(struct hook *hook, int32_t stage, struct span span) {
    const struct stage *here = &hook->stages[stage];
    for (int32_t i = 0; i < here->count; i++) {
        const struct part *part = &here->parts[i];
        int32_t from = below(part->rows, part->count, hook->start);
        int32_t to = below(part->rows, part->count, hook->start + hook->rows);
        for (; from < to; from++) {
            int32_t row = part->rows[from], at = position(hook, stage, row);
            if (at < 0) {
                continue; /* the last block is not computed there */
            }
            const float *z = NULL;
            if (part->read_input) {
                int32_t held = row - hook->start - hook->held_first;
                if (hook->held != layer_of(stage) || held < 0 || held >= hook->held_count) {
                    return false;
                }
                z = hook->input + (size_t)held * hook->width;
            }
            float *y = hook->output + (size_t)(at - span.first) * hook->width;
            steer_row(part, z, y, hook->width, hook->errors);
            hook->applied++;
            float energy = product(y, y, hook->width);
            if (energy - energy != 0) {
                hook->overflowed[row] = 1;
                hook->overflows++;
            }
        }
    }
    return true;
}

/* Whether any rows of a stage's tensor are, which comes next in the graph. */
static bool rows_wanted(struct hook *hook, int32_t stage) {
    if (stage < 0 ? hook->asked >= 0 : stage <= hook->asked) {
        begin(hook);
    }
    hook->asked = stage;
    struct span span = needed(hook, stage);
    return span.first < span.last;
}

/* Asked a thousand times a token, so that most names are told by their first letter. */
static bool wanted(struct hook *hook, const void *tensor) {
    if (hook->projection >= 0 && strcmp(hook->operation(tensor), "MUL_MAT") == 0) {
        int32_t stage = hook->projection;
        hook->projection = -1;
        return rows_wanted(hook, stage);
    }
    const char *name = hook->name(tensor);
    if (name[0] == 'l') {
        int32_t layer = number_after("l_out-", name);
        return layer >= 0 && layer < hook->layers && rows_wanted(hook, 2 * layer + 1);
    }
    if (name[0] == 'k') {
        int32_t layer = number_after("kqv_out-", name);
        if (layer >= 0 && layer < hook->layers && hook->stages[2 * layer].count) {
            hook->projection = 2 * layer;
        }
        return false;
    }
    return hook->reads_first && is_input(hook, name) && rows_wanted(hook, -1);
}

/* Fetch what is needed of a tensor, steer it, and keep a block's output where the next block's law reads it. */
static bool computed(struct hook *hook, void *tensor) {
    int32_t stage = hook->asked, width = hook->width;
    size_t row_size = (size_t)width * sizeof(float);
    int64_t elements = hook->elements(tensor);
    struct span span = needed(hook, stage);
    if (hook->bytes(tensor) != (size_t)elements * sizeof(float)) {
        return fail(hook, NOT_FLOATS, layer_of(stage));
    }
    if (elements != (int64_t)width * rows_of(hook, stage)) {
        return fail(hook, OTHER_ROWS, layer_of(stage));
    }
    size_t offset = span.first * row_size, size = (span.last - span.first) * row_size;
    hook->get(tensor, hook->output, offset, size);
    int32_t before = hook->applied;
    if (stage >= 0 && !steer_stage(hook, stage, span)) {
        return fail(hook, NO_INPUT, layer_of(stage));
    }
    if (hook->applied != before) {
        hook->set(tensor, hook->output, offset, size);
    }
    if (is_projection(stage)) {
        return true;
    }
    float *output = hook->output; /* what was put out goes into the next block */
    hook->output = hook->input;
    hook->input = output;
    hook->held = layer_of(stage) + 1;
    hook->held_first = span.first;
    hook->held_count = span.last - span.first;
    return true;
}

/* A ggml_backend_sched_eval_callback whose user data is a `struct hook`. */
bool mlx_lqr_eval(void *tensor, bool ask, void *user_data) {
    struct hook *hook = user_data;
    if (hook->instead) {
        return hook->instead(tensor, ask, hook->instead_data);
    }
    if (hook->failure || !hook->stages) {
        return !ask;
    }
    return ask ? wanted(hook, tensor) : computed(hook, tensor);
}

/* For whoever declares the structures again, to check that they are laid out alike. */
size_t mlx_lqr_size(int32_t which) {
    return which == 0 ? sizeof(struct part) : which == 1 ? sizeof(struct stage) : sizeof(struct hook);
}
