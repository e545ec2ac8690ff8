//! Moves image extents between hosts, over QUIC. May not: know KVM or Raft.
#![forbid(unsafe_code)]
