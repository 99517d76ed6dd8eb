use crate::{
    error::CliError,
    output::{ArtifactType, Printer},
    settings::Settings,
};
use systemprompt_contract::CheckoutId;

pub(crate) async fn confirm(id: CheckoutId, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let state = settings.session(printer)?.client.confirm_checkout(id).await?;
    printer.value(ArtifactType::PresentationCard, &state, |text| {
        text.line(format!("The checkout of {:?} is {}", state.tenant_name, state.status));
        text.pair("tenant", state.tenant_id);
    })
}
