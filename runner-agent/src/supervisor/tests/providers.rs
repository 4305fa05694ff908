//! The provider cache of the host, as a confined job uses it.

use super::*;
use crate::provider_cache::tests::{CONFIGURATION, Host, taken};

/// As far as `init`: the provider is none, so nothing can be planned with it.
async fn initialized(host: &Host, runner: &Path, lock_file: Option<&[u8]>) -> Driven {
    // In the runner's own directory, which jobs see only as far as they must.
    let set = |settings: &mut Settings| {
        settings.provider_cache = Some(runner.join("providers"));
        settings.terraform_cli_config = Some(host.at("cli.tfrc"));
        settings.confinement.hidden = Some(runner.to_owned());
    };
    let prepare = |directory: &JobDirectory| {
        configuration(CONFIGURATION)(directory);
        if let Some(text) = lock_file {
            std::fs::write(directory.join("work/.terraform.lock.hcl"), text).unwrap();
        }
    };
    let mut plan = Driven::start_with(Phase::Plan, samples::spec(), set, prepare).await;
    plan.order(go(vec![])).await;
    let result = plan.ended().await;
    let JobResult::Failed { reason, .. } = &result else { panic!("{result:?}") };
    assert!(reason.starts_with("terraform plan exited"), "{reason}\n{}", plan.log());
    plan
}

#[tokio::test]
async fn a_confined_job_takes_its_providers_from_the_cache_of_the_host() {
    let (host, runner) = (Host::new(), tempfile::tempdir().unwrap());
    std::fs::create_dir(runner.path().join("providers")).unwrap();
    let first = initialized(&host, runner.path(), None).await;
    assert!(!first.log().contains("from the shared cache directory"), "{}", first.log());
    host.damage_the_mirror();
    let lock_file = std::fs::read(first.directory.join("work/.terraform.lock.hcl")).unwrap();
    let second = initialized(&host, runner.path(), Some(&lock_file)).await;
    assert!(second.log().contains("from the shared cache directory"), "{}", second.log());
}

#[tokio::test]
async fn a_job_that_keeps_the_lock_of_the_cache_stops_no_other() {
    let (host, runner) = (Host::new(), tempfile::tempdir().unwrap());
    let cache = runner.path().join("providers");
    std::fs::create_dir(&cache).unwrap();
    let taken = taken(&cache);
    let job = initialized(&host, runner.path(), None).await;
    assert!(!job.log().contains("from the shared cache directory"), "{}", job.log());
    drop(taken);
}
