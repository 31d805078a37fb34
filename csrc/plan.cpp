#include "plan_view.hpp"
namespace forktree {
PlanView plan_view(const int32_t* b, int64_t) {
    PlanView v; const Header& h = *reinterpret_cast<const Header*>(b); v.header=&h; const int32_t* p=b+16;
    v.item=(const Item*)p; p+=5*h.items; v.seg=(const Seg*)p; p+=8*h.segs; v.merge_indptr=p; p+=h.tokens+1; v.merge_partial=p; p+=h.partials;
    v.row=(const Row*)p; p+=6*h.rows; v.node_len=p; p+=h.nodes; v.row_pos=p; p+=h.rows; v.mask=(const uint32_t*)p; return v;
}}
