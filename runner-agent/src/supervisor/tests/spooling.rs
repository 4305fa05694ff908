//! The host's spool while no agent lives: nobody ships, and nobody but the supervisors measures.

use super::*;

const CHATTY: &str = r#"
resource "terraform_data" "x" {
  input = "value"
  provisioner "local-exec" {
    command = "echo begun; head -c 3000000 /dev/zero | tr '\\0' x | fold -w 1000; sleep 1; echo unheard"
  }
}
"#;

#[tokio::test]
async fn the_bound_of_the_spool_holds_without_an_agent() {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(CHATTY)).await;
    plan.order(go(vec![])).await;
    let JobResult::Plan { digests, .. } = plan.ended().await else { panic!("{}", plan.log()) };
    let limit = 1 << 20;
    let set = |settings: &mut Settings| settings.spool_limit = limit;
    let mut kept = 0;
    let prepare = |directory: &JobDirectory| {
        restore(&plan.directory)(directory);
        // Another job's, which waits for an agent to send it.
        let sibling = directory.path().with_file_name("run0-apply-1-g1");
        std::fs::create_dir(&sibling).unwrap();
        std::fs::write(sibling.join("log"), vec![1; 512 << 10]).unwrap();
        kept = crate::spool::used(directory.path().parent().unwrap()).unwrap();
    };
    let mut apply = Driven::start_with(Phase::Apply, apply_spec(digests), set, prepare).await;
    apply.order(go(vec![])).await;
    let result = apply.ended().await;
    let log = apply.log();
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}\n{log}");
    // Its last lines and a block that was on its way are beyond it.
    assert!(kept + (log.len() as u64) < 2 * limit, "{} of log", log.len());
    assert!(log.contains("local-exec): begun") && !log.contains("local-exec): unheard"));
    assert!(log.contains("the spool of this host is full"), "{log}");
    assert!(log.contains("bytes of output were left out"), "{log}");
    let newest = *apply.directory.states().unwrap().last().unwrap();
    let state = std::fs::read(apply.directory.join(&JobDirectory::state_name(newest))).unwrap();
    assert!(String::from_utf8(state).unwrap().contains("terraform_data"));
}
