use clap::Parser;

use super::*;
use crate::policy::{ImdsMode, UnknownPods};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
}

fn parse(args: &[&str]) -> Result<Config, Vec<Problem>> {
    let args = [&["podgate", "--node-name=n1", "--cluster-name=c1"], args].concat();
    Config::parse(&Cli::parse_from(args).flags)
}

#[test]
fn the_defaults_are_valid() {
    let config = parse(&[]).unwrap();
    assert_eq!(
        config.defaults(),
        Defaults {
            imds: ImdsMode::Audit,
            imds_floor: ImdsMode::Off,
            imds_unknown: UnknownPods::Strict,
            imds_v1: false,
            tokenless: true,
        }
    );
    assert_eq!((config.target, config.when_down), (TargetMode::Auto, WhenDown::Auto));
    assert_eq!(config.target_v4.unwrap().to_string(), "169.254.175.1:80");
    assert_eq!(config.target_v6.unwrap().to_string(), "[fd70:6f64:6761:7465::1]:80");
    assert_eq!(config.eks_agent.unwrap().to_string(), "kube-system/eks-pod-identity-agent");
    assert_eq!(config.kube_identity, KubeIdentity::AssociatedNode);
    assert!(config.egress_filter && !config.audit_paths);
}

#[test]
fn the_egress_filter_and_the_audit_are_switched_by_their_flags() {
    let config = parse(&["--egress-filter=off", "--audit-paths=on"]).unwrap();
    assert!(!config.egress_filter && config.audit_paths);
}

#[test]
fn every_bad_value_is_named_at_once() {
    let problems = parse(&[
        "--cgroup-root=kubepods",
        "--imds=maybe",
        "--imds-floor=low",
        "--imds-unknown=known",
        "--imds-v1=yes",
        "--tokenless=no",
        "--egress-filter=on",
        "--audit-paths=true",
        "--target=both",
        "--target-v4=10.0.0.1:80",
        "--target-v6=[fe80::1]:80",
        "--eks-agent=eks-pod-identity-agent",
        "--when-down=pass",
        "--token-delegate=kube-system/csi,csi",
        "--prefetch=yes",
        "--netdev=a-name-that-is-too-long",
        "--kube-identity=admin",
        "--admin=9163",
        "--drain-secs=-1",
        "--log-format=xml",
        "--log-filter=a=b=c",
    ])
    .unwrap_err();
    let flags: Vec<_> = problems.iter().map(|problem| problem.flag).collect();
    assert_eq!(
        flags,
        [
            "cgroup-root",
            "imds",
            "imds-floor",
            "imds-unknown",
            "imds-v1",
            "tokenless",
            "egress-filter",
            "audit-paths",
            "target",
            "target-v4",
            "target-v6",
            "eks-agent",
            "when-down",
            "token-delegate",
            "prefetch",
            "netdev",
            "kube-identity",
            "admin",
            "drain-secs",
            "log-format",
            "log-filter"
        ]
    );
}

#[test]
fn addresses_in_use_elsewhere_are_refused() {
    for taken in ["169.254.169.254", "169.254.170.23", "169.254.172.9", "169.254.20.10", "169.254.1.1"] {
        assert!(parse(&[&format!("--target-v4={taken}:80")]).is_err(), "{taken}");
    }
    for taken in ["fd00:ec2::254", "fd00:ec2::23", "fd00:ec2:1::1", "fe80::1", "2001:db8::1"] {
        assert!(parse(&[&format!("--target-v6=[{taken}]:80")]).is_err(), "{taken}");
    }
    for free in ["--target-v4=169.254.171.23:8080", "--target-v6=[fd0d:6a7e::23]:80"] {
        assert!(parse(&[free]).is_ok(), "{free}");
    }
}

#[test]
fn own_addresses_are_required_unless_the_target_is_pod_identity() {
    let none = ["--target-v4=none", "--target-v6=none"];
    for (target, is_valid) in [("auto", false), ("own", false), ("pod-identity", true)] {
        let target = format!("--target={target}");
        assert_eq!(parse(&[&none[..], &[&target]].concat()).is_ok(), is_valid, "{target}");
    }
}

#[test]
fn token_delegates_are_service_accounts_and_none_by_default() {
    assert_eq!(parse(&[]).unwrap().token_delegates, []);
    let config = parse(&["--token-delegate=kube-system/csi-secrets-store, csi/s3.driver"]).unwrap();
    let delegates: Vec<_> = config.token_delegates.iter().map(ToString::to_string).collect();
    assert_eq!(delegates, ["kube-system/csi-secrets-store", "csi/s3.driver"]);
    for bad in ["csi", "/csi", "kube-system/", "a/b/c", "kube.system/csi", "kube-system/csi,", "*/csi"] {
        assert!(parse(&[&format!("--token-delegate={bad}")]).is_err(), "{bad}");
    }
}

#[test]
fn a_node_may_have_no_eks_agent() {
    assert_eq!(parse(&["--eks-agent=none"]).unwrap().eks_agent, None);
    for bad in ["--eks-agent=", "--eks-agent=a/b/c", "--eks-agent=/agent", "--eks-agent=aws/"] {
        assert!(parse(&[bad]).is_err(), "{bad}");
    }
}

#[test]
fn a_missing_name_is_a_problem_and_not_a_panic() {
    let cli = Cli::parse_from(["podgate", "--node-name=", "--cluster-name="]);
    let problems = Config::parse(&cli.flags).unwrap_err();
    assert_eq!(problems.iter().map(|p| p.flag).collect::<Vec<_>>(), ["node-name", "cluster-name"]);
}
