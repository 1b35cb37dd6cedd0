-- Wake who sleeps for these models, if work waits. ARGV: models.

for _, model in ipairs(ARGV) do
  settle(model)
end
return 1
