//! The manifest in `deploy/` against the agent that it starts.
#![expect(clippy::unwrap_used, reason = "test code")]

use agent::cli::Cli;
use clap::{CommandFactory as _, Parser as _};
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::EnvVar};
use serde_json::{Value, json};

const MANIFEST: &str = include_str!("../../deploy/podgate.yaml");

/// `podgate run` as its settings alone.
#[derive(clap::Parser)]
struct Run {
    #[command(flatten)]
    flags: agent::config::Flags,
}

fn documents() -> Vec<Value> {
    serde_saphyr::from_multiple(MANIFEST).unwrap()
}

fn daemon_set() -> DaemonSet {
    let documents = documents();
    let daemon_set = documents.iter().find(|document| document["kind"] == "DaemonSet").unwrap();
    serde_json::from_value(daemon_set.clone()).unwrap()
}

fn env() -> Vec<EnvVar> {
    let spec = daemon_set().spec.unwrap().template.spec.unwrap();
    spec.containers[0].env.clone().unwrap()
}

#[test]
fn every_variable_is_a_setting_of_the_agent() {
    let command = Cli::command();
    let run = command.find_subcommand("run").unwrap();
    let known: Vec<_> = run.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).collect();
    for variable in env() {
        assert!(known.contains(&variable.name.as_str()), "{} is no setting", variable.name);
    }
}

#[test]
fn the_arguments_and_values_start_an_agent() {
    let spec = daemon_set().spec.unwrap().template.spec.unwrap();
    let mut arguments = vec!["podgate".to_owned()];
    arguments.extend(spec.containers[0].args.clone().unwrap());
    for variable in env() {
        let flag = variable.name.strip_prefix("PODGATE_").unwrap().to_lowercase().replace('_', "-");
        // What Kubernetes fills in is the node's name.
        arguments.push(format!(
            "--{flag}={}",
            variable.value.unwrap_or_else(|| "ip-10-0-0-1.ec2.internal".into())
        ));
    }
    Cli::try_parse_from(&arguments).unwrap();
    arguments.remove(1);
    agent::config::Config::parse(&Run::parse_from(&arguments).flags).unwrap();
}

#[test]
fn podgate_has_no_right_of_its_own_on_pods_and_tokens() {
    for role in documents().iter().filter(|document| document["kind"] == "ClusterRole") {
        for rule in role["rules"].as_array().unwrap() {
            if rule["resources"] == json!(["namespaces"]) {
                assert_eq!(rule["verbs"], json!(["list", "watch"]));
                continue;
            }
            for verb in rule["verbs"].as_array().unwrap() {
                let verb = verb.as_str().unwrap();
                let constrained = verb == "impersonate:associated-node"
                    || verb.starts_with("impersonate-on:associated-node:")
                    || verb == "request-serviceaccounts-token-audience";
                assert!(constrained, "{verb}");
            }
        }
    }
}
