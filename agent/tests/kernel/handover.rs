//! The key by which one agent hands credentials over to the next: who finds it, and who does not.

use agent::{
    intercept::{HandoverKey, Interceptor, handover_key, pinned},
    maps::{self, Format},
};
use agent_common::policy::{IMDS_INTERCEPT, POD_IDENTITY_ON};
use aws_lc_rs::hmac;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::{IMDS, node::Node};

/// Tells keys apart without showing them.
fn fingerprint(key: &HandoverKey) -> Vec<u8> {
    hmac::sign(&key.hmac(), b"").as_ref().to_vec()
}

fn found(node: &Node) -> Vec<u8> {
    fingerprint(&handover_key(node.bpffs()).unwrap().expect("a key"))
}

#[test]
fn the_key_is_that_of_the_agent_whose_programs_are_in_force() {
    Node::run(|node| {
        let first = fingerprint(&node.interceptor.handover_key());
        assert_eq!(found(node), first);

        let second = Interceptor::load(&node.settings()).unwrap();
        let own = fingerprint(&second.handover_key());
        assert_ne!(own, first, "each agent has its own");
        assert_eq!(found(node), first, "until it takes over");

        drop(std::mem::replace(&mut node.interceptor, second));
        assert_eq!(found(node), first, "with the programs, it outlives its agent");
        node.attach();
        assert_eq!(found(node), own);
        let (pod, agent) = (node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON), node.agent());
        pod.dial(IMDS).unwrap();
        assert!(agent.accept().is_some(), "the programs do what they do");

        node.detach();
        assert!(handover_key(node.bpffs()).unwrap().is_none(), "nothing is in force");
    });
}

#[test]
fn no_pin_leads_to_the_key_and_no_program_of_others_reads_it() {
    Node::run(|node| {
        let pins = pinned(node.bpffs()).unwrap();
        assert!(!pins.is_empty() && pins.iter().all(|pin| !pin.ends_with("HANDOVER_KEY")), "{pins:?}");
        let mut listed = Vec::new();
        maps::list(node.bpffs(), Format::Plain, &mut listed).unwrap();
        let listed = String::from_utf8(listed).unwrap();
        assert!(listed.contains("IMDS_KEY") && !listed.contains("HANDOVER"), "{listed}");

        // A root pod that has the host's bpffs, but not the capability.
        let all = capabilities(None).unwrap();
        let mut without = all;
        without.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, without).unwrap();
        let refused = handover_key(node.bpffs());
        set_capabilities(None, all).unwrap();
        let error = refused.expect_err("the kernel keeps it from whoever is not the node's root");
        assert!(error.to_string().contains("HANDOVER_KEY"), "{error}");
        assert!(handover_key(node.bpffs()).unwrap().is_some());
    });
}
