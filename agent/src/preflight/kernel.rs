//! What the programs need of the kernel, found out by trying: a distribution's kernel has more or less than its version
//! number says.
//!
//! Owns the list; changes nothing.

use std::path::Path;

use aya::{
    maps::MapType,
    programs::ProgramType::{self, CgroupSkb, CgroupSockAddr, SchedClassifier, SkLookup, SockOps},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

/// The kernel's own types, by which the programs' maps are described.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

const PROGRAMS: [(ProgramType, &str); 5] = [
    (CgroupSockAddr, "programs for a cgroup's connect, bind and getpeername (CONFIG_CGROUP_BPF)"),
    (SockOps, "programs for a connection's handshake (sock_ops)"),
    (CgroupSkb, "programs for a cgroup's packets (cgroup_skb)"),
    (SkLookup, "programs that choose a connection's socket (sk_lookup)"),
    (SchedClassifier, "programs for a netdev's packets (sched_cls)"),
];

const MAPS: [(MapType, &str); 4] = [
    (MapType::SkStorage, "socket storage"),
    (MapType::RingBuf, "ring buffers"),
    (MapType::SockMap, "maps of sockets"),
    (MapType::PerCpuArray, "per-CPU arrays"),
];

const HELPERS: [(ProgramType, BpfHelper, &str); 14] = [
    (CgroupSockAddr, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in connect"),
    (CgroupSockAddr, BpfHelper::BPF_FUNC_get_netns_cookie, "network namespaces' cookies in connect"),
    (CgroupSockAddr, BpfHelper::BPF_FUNC_get_socket_cookie, "sockets' cookies in connect"),
    (CgroupSockAddr, BpfHelper::BPF_FUNC_get_current_cgroup_id, "cgroup ids in connect"),
    (CgroupSockAddr, BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id, "cgroups' ancestors in connect"),
    (CgroupSockAddr, BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "the coarse clock"),
    (SockOps, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in sock_ops"),
    (SockOps, BpfHelper::BPF_FUNC_load_hdr_opt, "reading TCP options"),
    (SockOps, BpfHelper::BPF_FUNC_store_hdr_opt, "writing TCP options"),
    (SockOps, BpfHelper::BPF_FUNC_reserve_hdr_opt, "room for TCP options"),
    (CgroupSkb, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in cgroup_skb"),
    (CgroupSkb, BpfHelper::BPF_FUNC_skb_ancestor_cgroup_id, "cgroups' ancestors in cgroup_skb"),
    (SchedClassifier, BpfHelper::BPF_FUNC_skb_ancestor_cgroup_id, "cgroups' ancestors in sched_cls"),
    (SkLookup, BpfHelper::BPF_FUNC_sk_assign, "choosing a socket in sk_lookup"),
];

/// What the kernel lacks. Empty too where it does not say, as to those who may not load programs.
pub(super) fn missing() -> Vec<&'static str> {
    let types = (!Path::new(TYPES).exists()).then_some("type information (CONFIG_DEBUG_INFO_BTF)");
    let programs = PROGRAMS
        .into_iter()
        .filter(|&(program, _)| matches!(is_program_supported(program), Ok(false)))
        .map(|(_, name)| name);
    let maps =
        MAPS.into_iter().filter(|&(map, _)| matches!(is_map_supported(map), Ok(false))).map(|(_, name)| name);
    let helpers = HELPERS
        .into_iter()
        .filter(|&(program, helper, _)| matches!(is_helper_supported(program, helper), Ok(false)))
        .map(|(_, _, name)| name);
    types.into_iter().chain(programs).chain(maps).chain(helpers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_it_all_or_does_not_say() {
        assert_eq!(missing(), [""; 0]);
    }
}
