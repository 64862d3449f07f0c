// Which piece of which sequence a block works on.
#pragma once

#include "params.h"

struct Work {
  int sequence, batch, start, length;
  int slot;          // of the segment in the list of all segments
  int carry;         // where the state after it lies
  bool first, last;  // in the direction of the pass
  bool valid;        // whether cu_seqlens rises from 0 to T
};

// Segment `slot`, of PassParams or Pieces; false where the list is shorter.
template <class Params>
__device__ bool find_work(const Params& p, int slot, Work& work) {
  bool begins, ends;
  if (p.table != nullptr) {
    const Segment s = p.table[slot];
    if (s.length < 0) return false;
    work.sequence = s.sequence, work.batch = 0, work.start = s.start, work.length = s.length;
    begins = s.ends & 1;
    ends = s.ends & 2;
    work.valid = p.table[p.positions].length == 0;
  } else {
    const int row = slot / p.segments, piece = slot % p.segments;
    work.sequence = work.batch = row, work.start = piece * p.segment_length;
    work.length = min(p.segment_length, p.tokens - work.start);
    begins = piece == 0;
    ends = piece == p.segments - 1;
    work.valid = true;
  }
  work.slot = slot;
  // Two segments that hand a state on don't begin in the same stretch: one of full length lies between their starts.
  work.carry = work.batch * p.segments + work.start / p.segment_length;
  work.first = p.reverse ? ends : begins;
  work.last = p.reverse ? begins : ends;
  return true;
}
