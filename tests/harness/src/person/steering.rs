//! What people do about runners, and about what a run has left behind.

use latchkey_proto::v1;
use tonic::Status;

use super::Person;

/// Runners.
impl Person {
    /// Looks a runner up by its name.
    pub async fn runner(&self, name: &str) -> Result<v1::Runner, Status> {
        let request = v1::ListRunnersRequest {
            organization: self.organization.clone(),
            page_size: 200,
            page_token: String::new(),
        };
        let runners = self.pools().list_runners(request).await?.into_inner().runners;
        let found = runners.into_iter().find(|runner| runner.name == name);
        found.ok_or_else(|| Status::not_found(format!("there is no runner {name}")))
    }

    pub async fn drain(&self, name: &str) -> Result<v1::Runner, Status> {
        let request = v1::DrainRunnerRequest { runner_id: self.runner(name).await?.runner_id };
        let answer = self.pools().drain_runner(request).await?;
        Ok(answer.into_inner().runner.unwrap_or_default())
    }

    pub async fn resume(&self, name: &str) -> Result<v1::Runner, Status> {
        let request = v1::ResumeRunnerRequest { runner_id: self.runner(name).await?.runner_id };
        let answer = self.pools().resume_runner(request).await?;
        Ok(answer.into_inner().runner.unwrap_or_default())
    }

    pub async fn revoke(&self, name: &str) -> Result<v1::Runner, Status> {
        let request = v1::RevokeRunnerRequest { runner_id: self.runner(name).await?.runner_id };
        let answer = self.pools().revoke_runner(request).await?;
        Ok(answer.into_inner().runner.unwrap_or_default())
    }
}

/// Ends, and what they leave.
impl Person {
    /// Cancels gracefully.
    pub async fn cancel(&self, run_id: &str) -> Result<v1::Run, Status> {
        self.canceled(run_id, false).await
    }

    pub async fn cancel_by_force(&self, run_id: &str) -> Result<v1::Run, Status> {
        self.canceled(run_id, true).await
    }

    /// Gives a lost run up, whatever its runner may bring later.
    pub async fn give_up(&self, run_id: &str) -> Result<v1::Run, Status> {
        let request = v1::DiscardRequest { run_id: run_id.to_owned() };
        Ok(self.runs().discard(request).await?.into_inner().run.unwrap_or_default())
    }

    async fn canceled(&self, run_id: &str, force: bool) -> Result<v1::Run, Status> {
        let request = v1::CancelRequest { run_id: run_id.to_owned(), force };
        Ok(self.runs().cancel(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Lists what is in quarantine beside a run.
    pub async fn quarantined(&self, run_id: &str) -> Result<Vec<v1::Quarantined>, Status> {
        let request = v1::ListQuarantinedRequest {
            organization: self.organization.clone(),
            run_id: run_id.to_owned(),
            page_size: 200,
            page_token: String::new(),
        };
        Ok(self.quarantine().list_quarantined(request).await?.into_inner().quarantined)
    }

    /// Makes a state in quarantine the environment's newest.
    pub async fn accept_state(
        &self,
        environment: &str,
        quarantined_id: &str,
    ) -> Result<v1::AcceptStateResponse, Status> {
        let request = v1::AcceptStateRequest {
            organization: self.organization.clone(),
            quarantined_id: quarantined_id.to_owned(),
            environment_confirmation: environment.to_owned(),
            older: false,
        };
        Ok(self.quarantine().accept_state(request).await?.into_inner())
    }

    /// Says that the remains of a run were dealt with.
    pub async fn unfreeze(
        &self,
        environment: &str,
        run_id: &str,
    ) -> Result<v1::Environment, Status> {
        let request = v1::UnfreezeEnvironmentRequest {
            organization: self.organization.clone(),
            environment: environment.to_owned(),
            run_id: run_id.to_owned(),
        };
        let answer = self.environments().unfreeze_environment(request).await?;
        Ok(answer.into_inner().environment.unwrap_or_default())
    }
}
