//! The WireGuard mesh shared by edge and node, which is not built yet.
//!
//! Addresses are planned and given by the replicated state already (`holdfast_model::node_prefix`: a ULA /48 for the
//! cluster, a /64 for a node, a /128 for an instance). Until the mesh exists an edge reaches the instances of nodes that
//! it has a route to, which on one host are the nodes' own TAP devices. The crate holds the mesh's place in the order of
//! dependencies: `{edge, node} → overlay → model`.
