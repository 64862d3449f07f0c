// Copies the tiles of masked attention that are used to shared memory, one unit of work after another.
#pragma once

#include "masked_variant.cuh"

// One warp: all lanes look for tiles that are used, the first one copies.
template <class T>
struct MaskedProducer {
  const MaskedParams& p;
  MaskedShared<T>& shared;
  int step = 0, number = 0;  // stages and units so far

  // Panels of `rows` rows from `token` on; each is one box, or all are.
  __device__ static void copy(uint8_t* to, int panels, int panel_bytes, const TiledTensor& from, Barrier& barrier,
                              int first_panel, int panel_columns, int token, int head, int batch) {
    if (from.at_once) {
      copy_box(to, from.map, barrier, Keep::kNormal, {0, token, first_panel, head, batch});
    } else {
#pragma unroll 1
      for (int i = 0; i < panels; ++i)
        copy_box(to + i * panel_bytes, from.map, barrier, Keep::kNormal,
                 {(first_panel + i) * panel_columns, token, 0, head, batch});
    }
  }
  __device__ static void copy_parts(uint8_t* to, int bytes, int panel_bytes, const TiledTensor& from, Barrier& barrier,
                                    int token, int head, int batch) {
    for (int part = 0; part < T::kParts; ++part)
      copy(to + part * bytes, T::kPanels, panel_bytes, from, barrier, 0, T::kPanelColumns, token,
           head / from.group * T::kParts + part, batch * from.batch);
  }
  __device__ void copy_z(uint8_t* to, Barrier& barrier, int column, int head, int batch) {
    if constexpr (T::kTf32)
      copy(to, T::kZPanels, T::kZPanelBytes, p.z, barrier, column / T::kPanelColumns, T::kPanelColumns, 0,
           head / p.z.group, batch * p.z.batch);
    else
      copy_parts(to, T::kYBytes, T::kYPanelBytes, p.z, barrier, column, head, batch);
  }

  __device__ void rows(const MaskedUnit& unit) {
    if (number > 0) shared.x_empty.wait((number - 1) & 1);
    ++number;
    shared.x_full.arrive_expecting(sizeof(shared.x));
    for (int problem = 0; problem < T::kProblems; ++problem)
      copy_parts(shared.x[problem][0], T::kXBytes, T::kXPanelBytes, p.problems[problem].x, shared.x_full, unit.first,
                 unit.head * p.shares, unit.batch);
  }

  __device__ void tile(const MaskedUnit& unit, int head, int tile, bool last) {
    const int stage = step % T::kStages, column = tile * T::kN;
    if (step >= T::kStages) shared.empty[stage].wait(parity(step, T::kStages) ^ 1);
    ++step;
    shared.last[stage] = last;
    Barrier& full = shared.full[stage];
    full.arrive_expecting(T::kStageBytes);
    uint8_t* to = shared.stages[stage];
    copy_parts(to, T::kYBytes, T::kYPanelBytes, p.y, full, column, head, unit.batch);
    to += T::kParts * T::kYBytes;
    copy_z(to, full, column, head, unit.batch);
    to += T::kParts * T::kYBytes;
    const int mask_head = head / p.mask.group, mask_batch = unit.batch * p.mask.batch;
    if (p.transposed)
      copy(to, T::kRows / T::kMaskPanel, T::kN * kPanelRow, p.mask, full, unit.first / T::kMaskPanel, T::kMaskPanel,
           column, mask_head, mask_batch);
    else
      copy(to, T::kN / T::kMaskPanel, T::kRows * kPanelRow, p.mask, full, column / T::kMaskPanel, T::kMaskPanel,
           unit.first, mask_head, mask_batch);
  }

  // Whether a tile of columns has weights that are not zero.
  __device__ bool used(const MaskedUnit& unit, int head, int tile) const {
    if (tile * T::kN >= p.columns) return false;
    if (p.used == nullptr) return true;
    const int row = unit.first / kMaskTile, column = tile * (T::kN / kMaskTile);
    const int first_row = p.transposed ? column : row, first_column = p.transposed ? row : column;
    const int rows = p.transposed ? T::kN / kMaskTile : T::kGroups, columns = p.transposed ? T::kGroups : T::kN / 64;
    const int entry = unit.batch * p.mask.batch * p.used_heads + head / p.mask.group;
    bool found = false;
    for (int i = first_row; i < min(first_row + rows, p.used_rows); ++i)
      for (int j = first_column; j < min(first_column + columns, p.used_columns); ++j)
        found |= p.used[(int64_t(entry) * p.used_rows + i) * p.used_columns + j] != 0;
    return found;
  }

  __device__ void walk(int lane) {
    const int tiles = (p.columns + T::kN - 1) / T::kN;
    int turn = 0;
    for (int index; (index = unit_of_turn(p, turn)) >= 0;) {
      const MaskedUnit unit(p, index, T::kRows);
      if (lane == 0) rows(unit);
      // A tile is copied when the next one is found, or the end: it says which it is.
      int before_head = unit.head * p.shares, before = -1;
      for (int share = 0; share < p.shares; ++share) {
        const int head = unit.head * p.shares + share;
        for (int first = 0; first < tiles; first += 32) {
          for (unsigned list = __ballot_sync(~0u, used(unit, head, first + lane)); list != 0; list &= list - 1) {
            if (lane == 0 && before >= 0) tile(unit, before_head, before, false);
            before_head = head, before = first + __ffs(list) - 1;
          }
        }
      }
      if (lane == 0) tile(unit, before_head, max(before, 0), true);
      __syncwarp();
    }
  }
};
