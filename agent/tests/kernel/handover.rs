//! The agent's keys, that by which it hands credentials over to the next and that of the tickets: who finds them, and who
//! does not.

use std::{path::Path, process::Command};

use agent::{
    intercept::{HandoverKey, Interceptor, handover_key, pinned},
    mapdump::{self, Format},
};
use agent_common::{
    abi::map,
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON},
};
use aws_lc_rs::hmac;
use aya::maps::MapData;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use serde_json::Value;

use crate::{IMDS, kernel_node::Node};

/// Tells keys apart without showing them.
fn fingerprint(key: &HandoverKey) -> Vec<u8> {
    hmac::sign(&key.hmac(), b"").as_ref().to_vec()
}

fn found(node: &Node) -> Vec<u8> {
    fingerprint(&handover_key(node.bpffs()).unwrap().expect("a key"))
}

/// As in a root pod that has the host's bpffs, but not the capability.
fn as_a_root_pod<T>(attempt: impl FnOnce() -> T) -> T {
    let all = capabilities(None).unwrap();
    let mut without = all;
    without.effective.remove(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, without).unwrap();
    let result = attempt();
    set_capabilities(None, all).unwrap();
    result
}

fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").arg("--json").args(arguments).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{arguments:?}: {output:?}"))
}

/// Every byte in what bpftool prints of a map, in its order.
fn bytes(dump: &Value) -> Vec<u8> {
    match dump {
        Value::String(text) => {
            text.strip_prefix("0x").and_then(|hex| u8::from_str_radix(hex, 16).ok()).into_iter().collect()
        }
        Value::Array(parts) => parts.iter().flat_map(bytes).collect(),
        // What is formatted is the same once more.
        Value::Object(parts) => {
            parts.iter().filter(|(name, _)| *name != "formatted").flat_map(|(_, part)| bytes(part)).collect()
        }
        _ => Vec::new(),
    }
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
        pod.connect(IMDS).unwrap();
        assert!(agent.accept().is_some(), "the programs do what they do");

        node.detach();
        assert!(handover_key(node.bpffs()).unwrap().is_none(), "nothing is effective");
    });
}

#[test]
fn no_pin_leads_to_the_key_and_no_program_of_others_reads_it() {
    Node::run(|node| {
        let pins = pinned(node.bpffs()).unwrap();
        assert!(!pins.is_empty() && pins.iter().all(|pin| !pin.ends_with("HANDOVER_KEY")), "{pins:?}");
        let mut listed = Vec::new();
        mapdump::list(node.bpffs(), Format::Plain, &mut listed).unwrap();
        let listed = String::from_utf8(listed).unwrap();
        assert!(listed.contains("IMDS_KEY") && !listed.contains("HANDOVER"), "{listed}");

        let refused = as_a_root_pod(|| handover_key(node.bpffs()));
        let error = refused.expect_err("the kernel keeps it from whoever is not the node's root");
        assert!(error.to_string().contains("HANDOVER_KEY"), "{error}");
        assert!(handover_key(node.bpffs()).unwrap().is_some());
    });
}

#[test]
fn no_pin_holds_the_key_of_the_tickets() {
    Node::run(|node| {
        node.attach();
        let (pod, agent) = (node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON), node.agent());
        pod.connect(IMDS).unwrap();
        assert!(agent.accept().is_some(), "there has been a ticket");
        let pins = pinned(node.bpffs()).unwrap();
        let path = |pin: &Path| pin.to_str().unwrap().to_owned();

        // Those who may go from a program to its maps find the key among its constants: whatever of them is no small
        // number.
        let link = pins.iter().find(|pin| pin.ends_with("links/connect4")).unwrap();
        let program = bpftool(&["link", "show", "pinned", &path(link)])["prog_id"].to_string();
        let maps = bpftool(&["prog", "show", "id", &program])["map_ids"].as_array().unwrap().clone();
        let is_constants = |id: &&Value| {
            let name = bpftool(&["map", "show", "id", &id.to_string()])["name"].clone();
            name.as_str().is_some_and(|name| name.ends_with(".rodata"))
        };
        let constants = maps.iter().find(is_constants).expect("the programs have constants");
        let content = bytes(&bpftool(&["map", "dump", "id", &constants.to_string()]));
        let is_large = |word: &&[u8]| word[6..] != [0, 0];
        let large: Vec<_> = content.windows(8).step_by(4).filter(is_large).collect();
        assert!(large.len() >= 2, "{content:?}");

        let mut read = 0;
        for pin in pins.iter().filter(|pin| pin.parent().is_some_and(|parent| parent.ends_with("maps"))) {
            let name = pin.file_name().unwrap().to_str().unwrap();
            assert!(!name.contains("rodata"), "{name}");
            // The kernel lists no socket storage.
            if name == map::ORIGINS {
                continue;
            }
            let content = bytes(&bpftool(&["map", "dump", "pinned", &path(pin)]));
            read += content.len();
            let found = large.iter().find(|word| content.windows(8).any(|window| window == **word));
            assert!(found.is_none(), "{found:?} is in {name}");
        }
        assert!(read > 1000, "only {read} bytes were looked at");

        let id = u32::try_from(constants.as_u64().unwrap()).unwrap();
        assert!(MapData::from_id(id).is_ok());
        assert!(as_a_root_pod(|| MapData::from_id(id)).is_err());
    });
}
