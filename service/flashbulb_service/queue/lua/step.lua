-- Tell those who watch which step of running jobs is done, fenced.
-- ARGV: now, worker, data or '' to tell nothing, number of jobs, then per job: id, attempt; then models.
-- Returns {whether work waits for one of the models, ids that are not the worker's...}.

local now, worker, data, num = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local first_model = 5 + 2 * num
local lost, waits = {}, 0
for i = 5, first_model - 1, 2 do
  if not owns(ARGV[i], worker, ARGV[i + 1]) then
    lost[#lost + 1] = ARGV[i]
  elseif data ~= '' then
    call('HSET', key('job', ARGV[i]), 'progress', data)
    note(ARGV[i], 'progress', now, 'data', data)
  end
end
for i = first_model, #ARGV do
  if has_work(ARGV[i]) then
    waits = 1
  end
end
return { waits, unpack(lost) }
